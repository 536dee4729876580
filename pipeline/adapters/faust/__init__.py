"""Faust, as the control plane: membership in a group, and users' agents. The only package that imports faust."""

import sys

# Faust reads options of its own program out of `sys.argv` when it is imported, and fails or changes the event loop by them.
_argv, sys.argv = sys.argv, sys.argv[:1]
try:
    import faust as _faust  # noqa: F401
finally:
    sys.argv = _argv
