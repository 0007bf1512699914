"""Imports of the fork server; they must not start a thread."""

import cli.parser
import train  # noqa: F401

cli.parser.register_classes()
