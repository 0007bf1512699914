"""What the fork server imports once; nothing here may start a thread."""

import cli
import train  # noqa: F401

cli.register_classes()
