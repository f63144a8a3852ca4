"""This project, on the same terms; a method is one of the named recipes.

The graph is captured beforehand, as the others load their model beforehand; weights are read inside the measured call.
"""

from protocol import Request, measured, read_request, versions, write_result

import qcompiler as qc

RECIPES = {
    "rtn": "w4a16-rtn",
    "gptq": "w4a16-gptq",
    "awq": "w4a16-awq",
    "awq-gptq": "w4a16-awq-gptq",
    "int8": "w8a8-rtn",
    "smoothquant": "w8a8-smoothquant",
    "fp8": "fp8",
}


def main(request: Request) -> None:
    graph = qc.capture(request.model)
    calibration = qc.Calibration.from_tokens(request.tokens)
    result, numbers = measured(lambda: qc.compile(graph, RECIPES[request.method], calibration))
    result.save(request.out / "native")
    own = {"qcompiler": qc.__version__, **versions("torch", "transformers")}
    write_result(request, numbers, {}, versions=own)


if __name__ == "__main__":
    main(read_request())
