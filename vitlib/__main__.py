"""`python -m vitlib` lists what can be called."""

COMMANDS = {
    "vitlib.report run notebooks/N.ipynb --study S": "execute a notebook into outputs/S/",
    "vitlib.report render --study S": "make the pages of executed notebooks again",
    "vitlib.report index --study S": "write outputs/S/index.html",
    "vitlib.report summary --study S": "print the table of variants",
    "vitlib.study.params N": "print the parameters cell of a notebook, such as 2_evaluate",
    "vitlib.training.standin --help": "train a base where no pretrained weights can be had",
}

if __name__ == "__main__":
    for command, meaning in COMMANDS.items():
        print(f"python -m {command:<44}{meaning}")
