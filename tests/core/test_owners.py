"""Ids of owners say which partition they are of, and whose process it is."""

from pipeline.core.owners import is_owner_of, owner_id, owner_name


def test_an_id_names_partition_and_process() -> None:
    """Names may hold any character; ids without a name, of earlier versions and of embedded logs, are valid and nameless."""
    for name in ("", "alpha", "a:b:", "host-3"):
        for partition in (3, 13):
            made = owner_id("my-app", partition, "0f3a", name)
            assert owner_name(made) == name
            assert [number for number in range(20) if is_owner_of(number, made)] == [partition]
    assert owner_id("app", 3, "0f3a") == "app-3:0f3a"
    assert (owner_name(""), is_owner_of(3, "")) == ("", True)
