from qcompiler.cli.printing import Streamed, print_compiled


def test_many_layers_left_alone_are_a_number_on_the_terminal(capsys):
    def printed(count):
        summary = dict.fromkeys(("bytes_before", "bytes_after", "bits_per_weight", "seconds", "peak_rss_bytes"), 1)
        summary |= {"sites": [], "notes": [], "artifacts": {"native": "out/native"}, "held_out": None, "compared": {}}
        summary["artifact_bytes"] = {"native": 3 << 20}
        summary["skipped"] = [{"site": f"layer.{i}", "reason": "no"} for i in range(count)]
        print_compiled(summary)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("left alone")]

    assert len(printed(8)) == 8
    many = printed(40)
    assert many[:2] == ["left alone: layer.0: no", "left alone: layer.1: no"]
    assert many[7:] == ["left alone: 33 more, listed in out/native/report.html"]


def test_what_each_artifact_takes_is_shown(capsys):
    summary = dict.fromkeys(("bytes_before", "bytes_after", "bits_per_weight", "seconds", "peak_rss_bytes"), 1)
    summary |= {"sites": [], "skipped": [], "held_out": None, "artifacts": {"native": "o/native", "onnx": "o/onnx"}}
    summary["compared"] = {"kernels": {"max_difference": 0.01, "tolerance": 0.05}}
    print_compiled({**summary, "artifact_bytes": {"native": 5 << 20, "onnx": 7 << 20}, "notes": ["onnx: told here"]})
    shown = capsys.readouterr().out
    assert "o/native, 5.0 MiB" in shown
    assert "o/onnx, 7.0 MiB" in shown
    assert "note: onnx: told here" in shown
    assert "1.0e-02, at most 5.0e-02" in shown


def test_a_text_is_printed_as_it_comes(capsys):
    shown = Streamed("It was")
    assert capsys.readouterr().out == ""
    shown(" dark")
    assert capsys.readouterr().out == "It was dark"
    shown(".")
    shown.end()
    assert capsys.readouterr().out == ".\n"
    Streamed("nothing more").end()
    assert capsys.readouterr().out == "nothing more\n"
