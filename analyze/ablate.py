"""`vmamba ablate` of this checkout: python analyze/ablate.py --help"""

from _door import command

parser = command("ablate")

if __name__ == "__main__":
    parser().run()
