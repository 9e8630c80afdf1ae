"""`python -m vitlib` lists what can be called."""

COMMANDS = {
    "vitlib.run run notebooks/N.ipynb --study S": "execute a notebook into outputs/S/",
    "vitlib.run render --study S": "make the pages of executed notebooks again",
    "vitlib.run index --study S": "write outputs/S/index.html",
    "vitlib.run summary --study S": "print the table of variants",
    "vitlib.params N": "print the parameters cell of a notebook, such as 2_evaluate",
    "vitlib.standin --help": "train a base where no pretrained weights can be had",
}

if __name__ == "__main__":
    for command, meaning in COMMANDS.items():
        print(f"python -m {command:<44}{meaning}")
