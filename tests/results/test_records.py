"""Hashes of configurations: rows that were stored keep theirs when a field is added."""

import pytest

from tests.results.making import make_fidelity, make_sample


def test_rows_from_before_a_field_keep_their_hash():
    assert make_sample().config == "e172350a79eedaf8"
    assert make_fidelity().config == "9a8135c60a6e8a91"


@pytest.mark.parametrize("field", ["kv_dtype", "kv_bits"])
def test_a_format_of_keys_and_values_is_part_of_the_configuration(field):
    sample, reading = make_sample(), make_fidelity()
    for record in (sample, reading):
        changed = type(record)(**{**record.__dict__, field: "float16"})
        assert changed.config_hash != record.config_hash
