"""Reads settings: `pipeline.toml`, then the environment (`PIPELINE_*`), then flags; later ones win.

All settings are in one flat namespace: `flush_interval_ms` is `flush_interval_ms = 50` in the file and
`PIPELINE_FLUSH_INTERVAL_MS=50` in the environment, in whatever group it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainValidator, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from pipeline.errors import Invalid
from pipeline.secret import Secret
from pipeline.settings import (
    ENV_PREFIX,
    FILE,
    FILE_VARIABLE,
    GROUPS,
    OTHER_VARIABLES,
    ClientSettings,
    IngestSettings,
    KafkaSettings,
    LogSettings,
    PublisherSettings,
    QuerySettings,
    WorkerSettings,
    default_of,
)


@dataclass(frozen=True)
class Config:
    """All settings of a process, by group."""

    publisher: PublisherSettings
    client: ClientSettings
    kafka: KafkaSettings
    log: LogSettings
    worker: WorkerSettings
    query: QuerySettings
    ingest: IngestSettings


class _Base(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", env_ignore_empty=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, _file())


_items = [item for group in GROUPS for item in fields(group)]
_types: dict[type, Any] = {Secret: Annotated[Any, PlainValidator(lambda value: value)]}  # `settings.check_value` checks it
_names: dict[str, Any] = {item.name: (_types.get(kind := type(default_of(item)), kind), default_of(item)) for item in _items}
_Settings: type[_Base] = create_model("_Settings", __base__=_Base, **_names)


def load(flags: Mapping[str, Any] | None = None) -> Config:
    """Return all settings. `flags` are those of the command line; None means that a flag was not given.

    Raises `Invalid`, naming the setting, if a value or a name is wrong, or the file is not TOML.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    _check_names(given, "")
    prefixed = {name.upper() for name in os.environ} - OTHER_VARIABLES
    _check_names([n.removeprefix(ENV_PREFIX).lower() for n in prefixed if n.startswith(ENV_PREFIX)], "in the environment")
    path = _file()
    if FILE_VARIABLE in os.environ and not path.is_file():
        raise Invalid(f"{FILE_VARIABLE} names a file that is not there: {path}")
    try:
        values = _Settings(**given).model_dump()
    except ValidationError as error:
        wrong = error.errors()[0]
        name = str(wrong["loc"][0])
        if wrong["type"] == "extra_forbidden":
            raise _unknown(name, f"in {path}") from None
        needed = _needed(wrong["type"]) or wrong["msg"]
        shown = type(wrong["input"]).__name__ if isinstance(_names[name][1], Mapping) else f"{wrong['input']!r:.100}"
        raise Invalid(f"setting {name}: {needed}, got {shown}") from None
    except SettingsError as error:  # the only setting that is no plain value
        raise Invalid(f"setting kafka: {ENV_PREFIX}KAFKA must be a JSON object: {error.__cause__}") from None
    except (ValueError, OSError) as error:
        raise Invalid(f"{path}: {error}") from None
    return Config(
        publisher=PublisherSettings(**_of(PublisherSettings, values)),
        client=ClientSettings(**_of(ClientSettings, values)),
        kafka=KafkaSettings(**_of(KafkaSettings, values)),
        log=LogSettings(**_of(LogSettings, values)),
        worker=WorkerSettings(**_of(WorkerSettings, values)),
        query=QuerySettings(**_of(QuerySettings, values)),
        ingest=IngestSettings(**_of(IngestSettings, values)),
    )


def _file() -> Path:
    return Path(os.environ.get(FILE_VARIABLE, FILE))


def _check_names(names: Any, where: str) -> None:
    for name in sorted(set(names) - _names.keys()):
        raise _unknown(name, where)


def _unknown(name: str, where: str) -> Invalid:
    close = get_close_matches(name, _names, n=1)
    return Invalid(f"unknown setting {name!r:.100}{where and ' '}{where}" + (f"; did you mean {close[0]}?" if close else ""))


def _needed(error_type: str) -> str:
    """Return in words what a setting must be, by pydantic's code of the error: codes are stable, its texts are not."""
    return next((words for start, words in _NEEDED.items() if error_type.startswith(start)), "")


_NEEDED = {
    "int_": "a whole number is needed",
    "float_": "a number is needed",
    "finite_": "a number is needed",
    "bool_": "true or false is needed",
    "dict_": "a table of options is needed",
    "string_": "a text is needed",
    "path_": "a path is needed",
}


def _of(group: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(group)}
