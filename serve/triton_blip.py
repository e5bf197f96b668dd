"""BLIPs on a server. Those that write or judge are served whole: one python model has all graphs, which wait for one another.

caption   image -> caption
answer    image, question, and answers to choose from or none -> answer
judge     image, other_image, statement -> probability that it is true
match     image, text -> probability that they belong together; of a BLIP for retrieval, by its embed_image and score_match
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipress.errors import ExportError
from clipress.runtime.export_folder import DESCRIPTION, Exported
from clipress.runtime.served import ANSWER, ANSWERS, CAPTION, JUDGE, MATCH, PROBABILITY, USES
from clipress.serve.graphs import IMAGE, is_whole, use_in_words, use_of
from clipress.serve.sizing import helpers
from clipress.serve.triton_files import Files
from clipress.serve.triton_parts import FP32, STRING, Served, add_instances, begin, limit_rate, set_parameters

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

PROGRAMS = {
    CAPTION: (
        "Captions of images, as `python caption.py IMAGE IMAGE ...`",
        """\
images = column("image", [pathlib.Path(path).read_bytes() for path in sys.argv[1:]])
for text in client.infer("caption", [images]).as_numpy("caption"):
    print(text.decode())""",
    ),
    ANSWER: (
        "The answer to a question about an image, as `python answer.py IMAGE QUESTION [ANSWER ANSWER ...]`",
        """\
path, question, *answers = sys.argv[1:]
asked = [column("image", [pathlib.Path(path).read_bytes()]), column("question", [question.encode()])]
if answers:  # to choose from; without them it is written
    asked.append(column("answers", [answer.encode() for answer in answers]))
print(client.infer("answer", asked).as_numpy("answer")[0].decode())""",
    ),
    JUDGE: (
        "Whether a statement about two images is true, as `python judge.py IMAGE IMAGE STATEMENT`",
        """\
first, second, statement = sys.argv[1:]
images = [column(name, [pathlib.Path(path).read_bytes()]) for name, path in (("image", first), ("other_image", second))]
answer = client.infer("judge", [*images, column("statement", [statement.encode()])])
print(f"{answer.as_numpy('probability')[0]:.1%} likely to be true")""",
    ),
}
"""Of the README: what a program does, and its requests."""


def blip_config(served: Served) -> ModelConfig | None:
    """Describe the model that does what a BLIP is for; None for other models."""
    use, exported = use_of(served.exported), served.exported
    if use is None:
        return None
    config = begin(use, "python", 0)
    for name in USES[use].takes:
        config.input.add(name=name, data_type=STRING, dims=[-1], optional=name == ANSWERS)
    gives = USES[use].gives
    config.output.add(name=gives, data_type=FP32 if gives == PROBABILITY else STRING, dims=[-1])
    if is_whole(exported):
        add_instances(config, served.sizes[IMAGE].instances)
        limit_rate(config, served.settings)
        set_parameters(config, intra_op_thread_count=str(served.sizes[IMAGE].threads))
    else:
        add_instances(config, helpers(served.settings))
        set_parameters(config, image_batch=str(served.largest_batch(IMAGE)))
    return config


def blip_files(exported: Exported, backend: str) -> Files:
    """Return the files beside the code of that model: a whole export. Raises ExportError for the backend tensorrt."""
    if not is_whole(exported):
        return {}
    if backend == "tensorrt":
        raise ExportError(
            f"{exported.folder}: a model that {use_in_words(exported)} is served by ONNX Runtime, found the backend tensorrt. Use the "
            "backend python."
        )
    files = [
        path for name in exported.graphs for path in (exported.onnx(name), exported.data(name)) if path is not None
    ]
    about = exported.model_dump_json(exclude={"folder", "parity", "explicit"}, exclude_none=True)
    return {DESCRIPTION: about.encode(), **{path.name: path for path in files}}


def blip_code(exported: Exported) -> str:
    """Return which python file runs the model."""
    return "blip" if is_whole(exported) else MATCH


def blip_row(exported: Exported) -> tuple[str, str, str]:
    """Return a row of the README's table: the model, what it takes and what it gives."""
    use = use_of(exported)
    takes = [
        f"`{name}` BYTES [A] (optional, to choose from)" if name == ANSWERS else f"`{name}` BYTES [N]"
        for name in USES[use].takes
    ]
    kind = "FP32" if USES[use].gives == PROBABILITY else "BYTES"
    return f"`{use}`", ", ".join(takes), f"`{USES[use].gives}` {kind} [N]"
