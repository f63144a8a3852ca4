"""The table of ONNX Runtime beside others."""

from benchmarks.ort import Form, read_bandwidth, table


def test_table_has_medians_and_the_share_of_the_bandwidth() -> None:
    form, other = Form(2_000_000, 0.0123), Form()
    for batch, prefill, decode in ((1, 100.0, 10.0), (1, 300.0, 50.0), (1, 200.0, 20.0), (8, 900.0, 80.0)):
        form.add(batch, prefill, decode)
    other.add(1, 50.0, 5.0)
    head, _, first, second = table({"ours": form, "theirs": other}, bandwidth=1e8).splitlines()
    assert head.count("at once") == 4
    assert first == "| ours | 2.0 | 0.012 | 200 | 20 | 900 | 80 | 40% |"
    assert second == "| theirs | – | – | 50 | 5 | – | – | – |"


def test_bandwidth_is_that_of_reading() -> None:
    assert 1e8 < read_bandwidth(1 << 22, turns=2) < 1e13
