"""Says which installed packages differ from the versions tested with this Python."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

lock = Path(__file__).parent / "py{}{}.txt".format(*sys.version_info)
if not lock.exists():
    sys.exit(f"no versions were tested with this Python: {lock} does not exist")
print(f"Packages that differ from {lock.name}:")
for name, tested in re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(), re.MULTILINE):
    try:
        here = version(name).split("+")[0]
    except PackageNotFoundError:
        here = "absent"
    if here != tested:
        print(f"  {name}: tested {tested}, here {here}")
