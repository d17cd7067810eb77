"""One file a format. A new format is one file and one line here."""

from lib.datasets import demo, folder

FORMATS = {"demo": demo.open_splits, "folder": folder.open_splits}
