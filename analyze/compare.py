"""`vmamba compare` of this checkout: python analyze/compare.py --help"""

from _door import command

parser = command("compare")

if __name__ == "__main__":
    parser().run()
