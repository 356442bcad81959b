"""Text for TensorBoard, which renders Markdown."""


def code_block(text: str) -> str:
    """Markdown that shows text as it is: an indented block, in which no character has a meaning."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
