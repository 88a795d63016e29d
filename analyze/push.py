"""`vmamba push` of this checkout: python analyze/push.py --help"""

from _door import command

parser = command("push")

if __name__ == "__main__":
    parser().run()
