"""`python -m vitlib` lists the commands of the module."""

COMMANDS = {
    "report run notebooks/N.ipynb --study S": "execute a notebook into outputs/S/",
    "report index --study S": "write outputs/S/index.html",
    "report summary --study S": "print the table of variants of a study",
    "study.params N": "print the parameters cell of a notebook, such as 2_evaluate",
    "pretrained": "fetch a small pretrained network, ViT-S/14, and save it as a checkpoint",
}

if __name__ == "__main__":
    for command, meaning in COMMANDS.items():
        print(f"python -m vitlib.{command:<41}{meaning}")
