"""Everything whole, on one rank."""

from . import Layout


class Whole(Layout):
    """As `Layout` says."""

    name = "whole"


ROW = Whole()
