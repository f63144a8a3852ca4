"""This project, on the same terms: ``rtn`` and ``gptq`` are the recipes ``w4a16-rtn`` and ``w4a16-gptq``.

The graph is captured beforehand, as the others load their model beforehand; weights are read inside the measured call.
"""

from protocol import Request, measured, read_request, versions, write_result

import qcompiler as qc


def main(request: Request) -> None:
    graph = qc.capture(request.model)
    calibration = qc.Calibration.from_tokens(request.tokens)
    result, numbers = measured(lambda: qc.compile(graph, f"w4a16-{request.method}", calibration))
    result.save(request.out / "native")
    own = {"qcompiler": qc.__version__, **versions("torch", "transformers")}
    write_result(request, numbers, {}, versions=own)


if __name__ == "__main__":
    main(read_request())
