"""Makes a conversation of images and a caption, as the kind of the source asks for.

====================  =========================================  =====================================
kind                  user                                       assistant
====================  =========================================  =====================================
text_to_image         a request for what the caption describes   the image
understanding         the images, a request to describe          the caption
editing               the images but the last, the caption as    the last image
                      an instruction
reconstruction        the image, a request to repeat it          the same image
====================  =========================================  =====================================

The words of a request are drawn by the sample's id in its source, so that they stay the same in every pass, process and
run, whatever the source is called.
"""

from megatron_unimm.config.data import SampleKind
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.sample import Turn
from megatron_unimm.data.templates import fill_edit_template, fill_template, template_rng

SEED = 0
"""Of the words; the training seed has no say, so that all runs ask alike."""

DESCRIBE_TEMPLATES = (
    "Describe the image.",
    "Please tell me what this image shows.",
    "What is in this picture?",
    "Write a caption for the image.",
    "Can you describe this picture?",
    "What can be seen here?",
)
REPEAT_TEMPLATES = (
    "Draw this image again, as it is.",
    "Please repeat this picture without any change.",
    "Can you reproduce the image exactly?",
    "Show me the same image once more.",
    "Reconstruct this picture.",
    "Could you copy the image as it stands?",
)


def caption_turns(caption: str, num_images: int, kind: SampleKind, sample_id: str, where: str) -> tuple[Turn, ...]:
    """The conversation of a caption.

    Args:
        caption: without marks of images; may be empty for ``reconstruction`` only.
        num_images: images of the sample.
        kind: of the source.
        sample_id: decides the words; without the name of the source.
        where: the place of the sample, for messages.

    Raises:
        SampleError: the caption is empty, there are too many or too few images, or the kind cannot be told by a
            caption.
    """
    if kind == "interleaved":
        what = "a caption is no document; samples of kind interleaved need 'conversations'"
        raise SampleError(where, what, "malformed conversation")
    if not caption and kind != "reconstruction":
        raise SampleError(where, "the caption is empty", "malformed conversation")
    _check_count(num_images, kind, where)
    rng = template_rng(SEED, sample_id, 0)
    if kind == "text_to_image":
        return Turn("user", (fill_template(caption, rng),)), Turn("assistant", (0,))
    if kind == "editing":
        last = num_images - 1
        return Turn("user", (*range(last), f"\n{fill_edit_template(caption, rng)}")), Turn("assistant", (last,))
    if kind == "reconstruction":
        return Turn("user", (0, f"\n{REPEAT_TEMPLATES[rng.integers(len(REPEAT_TEMPLATES))]}")), Turn("assistant", (0,))
    request = DESCRIBE_TEMPLATES[rng.integers(len(DESCRIBE_TEMPLATES))]
    return Turn("user", (*range(num_images), f"\n{request}")), Turn("assistant", (caption,))


def _check_count(num_images: int, kind: SampleKind, where: str) -> None:
    least, most, words = {
        "text_to_image": (1, 1, "exactly 1 image"),
        "reconstruction": (1, 1, "exactly 1 image"),
        "editing": (2, None, "at least 2 images, the last of them the result"),
        "understanding": (1, None, "at least 1 image"),
    }[kind]
    if num_images < least or (most is not None and num_images > most):
        what = f"{num_images} images; a caption of kind {kind} goes with {words}"
        raise SampleError(where, what, "image count")
