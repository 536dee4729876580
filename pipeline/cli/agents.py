"""`pipeline worker -A MODULE:APP`: finds the app."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from types import ModuleType
from typing import TYPE_CHECKING

from pipeline.errors import Invalid

if TYPE_CHECKING:
    from pipeline.adapters.faust.agents import AgentsApp


def load_app(where: str) -> AgentsApp:
    """Return the app that `where`, MODULE:APP, names; the module is looked for in the current directory, too.

    Raises `Invalid` if there is none; a traceback of the module's import is printed before.
    """
    from pipeline.adapters.faust.agents import AgentsApp  # before the module, which may import faust: see there

    name, colon, attribute = where.partition(":")
    if not (name and colon and attribute):
        raise Invalid(f"-A {where:.100}: MODULE:APP is needed, such as shop:app")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = _import(name, where)
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise Invalid(f"-A {where:.100}: module {name} has no {attribute}")
        found = getattr(found, part)
    if not isinstance(found, AgentsApp):
        raise Invalid(f"-A {where:.100}: {attribute} is no pipeline.faust_app() but {type(found).__name__}")
    return found


def _import(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise Invalid(f"-A {where:.100}: no module {error.name} in {os.getcwd()} or where Python looks") from None
        traceback.print_exc()
        raise Invalid(f"-A {where:.100}: importing {name} failed: {error!r}") from None
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        raise Invalid(f"-A {where:.100}: importing {name} failed: {error!r}") from None
