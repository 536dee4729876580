"""Ids of owners say which partition they are of, and whose process it is."""

from pipeline.core.owners import is_owner_of, is_placed_at, owner_id, owner_name, with_offset


def test_an_id_names_partition_and_process() -> None:
    """Names may hold any character; ids without a name, of earlier versions and of embedded logs, are valid and nameless."""
    for name in ("", "alpha", "a:b:", "host-3"):
        for partition in (3, 13):
            made = owner_id("my-app", partition, "0f3a", name)
            assert owner_name(made) == name
            assert [number for number in range(20) if is_owner_of(number, made)] == [partition]
    assert owner_id("app", 3, "0f3a") == "app-3:0f3a"
    assert (owner_name(""), is_owner_of(3, "")) == ("", True)


def test_an_id_in_a_position_names_its_offset() -> None:
    """A position record proves nothing at another offset than its own; those of earlier versions can stand anywhere."""
    for name in ("", "alpha", "a:b@7:", "@8"):
        made = with_offset(owner_id("my@app", 3, "0f3a", name), 57)
        assert (owner_name(made), is_owner_of(3, made), is_owner_of(57, made)) == (name, True, False)
        assert [at for at in (5, 7, 8, 56, 57, 570) if is_placed_at(made, at)] == [57]
        assert is_placed_at(owner_id("my@app", 3, "0f3a", name), 8)
    assert is_placed_at("", 8)
