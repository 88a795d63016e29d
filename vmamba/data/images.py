"""Reading images."""


class UnreadableImage(Exception):
    """An image that cannot be read or decoded.  Its text names the image and says why."""
