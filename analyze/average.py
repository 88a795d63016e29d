"""`vmamba average` of this checkout: python analyze/average.py --help"""

from _door import command

parser = command("average")

if __name__ == "__main__":
    parser().run()
