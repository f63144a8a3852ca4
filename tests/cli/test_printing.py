from qcompiler.cli.printing import print_compiled


def test_many_layers_left_alone_are_a_number_on_the_terminal(capsys):
    def printed(count):
        summary = dict.fromkeys(("bytes_before", "bytes_after", "bits_per_weight", "seconds", "peak_rss_bytes"), 1)
        summary |= {"sites": [], "notes": [], "artifacts": {"native": "out/native"}, "held_out": None}
        summary["skipped"] = [{"site": f"layer.{i}", "reason": "no"} for i in range(count)]
        print_compiled(summary)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("left alone")]

    assert len(printed(8)) == 8
    many = printed(40)
    assert many[:2] == ["left alone: layer.0: no", "left alone: layer.1: no"]
    assert many[7:] == ["left alone: 33 more, listed in out/native/report.html"]
