"""Faust as the control plane: group membership, and users' agents. The only package that imports faust.

`app` is the Faust app of a member, `membership` joins the group with it; `member_metadata` is what members tell each other.
`agents`, `offsets` and `changes` run users' agents. `group` describes a group from outside.
"""

import sys

# Faust reads options of its own program out of `sys.argv` when it is imported, and fails or changes the event loop by them.
_argv, sys.argv = sys.argv, sys.argv[:1]
try:
    import faust as _faust  # noqa: F401
finally:
    sys.argv = _argv
