"""What a rule says of an update that is of the right form, and that it does not take."""


class UpdateRefused(ValueError):
    """The numbers of an update are such that it is not counted: the round can go on without it.

    What is not of the round's form (another key, another shape) is no update: that is its sender's mistake, and any
    other ``ValueError``.
    """
