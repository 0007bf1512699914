"""What the fork server imports once; nothing here may start a thread."""

import cli.parser
import train  # noqa: F401

cli.parser.register_classes()
