"""`python -m vitlib` lists the commands of the module."""

COMMANDS = {
    "run run notebooks/N.ipynb --study S": "execute a notebook into outputs/S/",
    "run index --study S": "write outputs/S/index.html",
    "run summary --study S": "print the table of variants of a study",
    "params N": "print the parameters cell of a notebook, such as 2_evaluate",
    "standin --help": "train a base where no pretrained weights can be had",
}

if __name__ == "__main__":
    for command, meaning in COMMANDS.items():
        print(f"python -m vitlib.{command:<38}{meaning}")
