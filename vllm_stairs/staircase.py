"""The method on one screen: expand a draft into stairs, validate them.

Source: D. Grigaliunas, M. Lukosevicius, "Inference acceleration for large language
models using 'stairs' assisted greedy generation", IVUS 2024, arXiv 2407.19947.

This is the reference, in the paper's words and in plain Python: no vLLM, no model, no
tensors. Every fast path (:mod:`vllm_stairs.acceptor`, :mod:`vllm_stairs.scorer`,
:mod:`vllm_stairs.hf`) is tested against these functions.
"""

from collections.abc import Sequence


def expand(prefix: Sequence[int], draft: Sequence[int]) -> list[list[int]]:
    """Lay a draft out as stairs.

    Args:
        prefix: the text so far, as token ids.
        draft: the K token ids that the draft model wrote after it.

    Returns:
        K + 1 growing rows: ``prefix``, ``prefix + d1``, ..., ``prefix + d1..dK``. The
        target predicts the next token of each row in one forward pass.
    """
    return [[*prefix, *draft[:height]] for height in range(len(draft) + 1)]


def validate(draft: Sequence[int], predictions: Sequence[int]) -> list[int]:
    """Stairs validation: what one staircase adds to the text.

    Args:
        draft: the K drafted token ids.
        predictions: K + 1 token ids; ``predictions[i]`` is the target's own next token
            after row i, that is after ``prefix + d1..di``.

    Returns:
        The accepted tokens: the drafts that agree with the ground truth, in order, and
        the target's own token after the last of them. Between 1 and K + 1 ids, and
        always the beginning of the text that the target alone would write.
    """
    # 1. The first row with its prediction is the ground truth.
    ground_truth = [predictions[0]]
    for drafted, prediction in zip(draft, predictions[1:], strict=True):
        # 2. A row is approved if its last token is the ground truth's last token.
        if drafted != ground_truth[-1]:
            break
        # 3. Then the row with its own prediction becomes the ground truth.
        ground_truth.append(prediction)
    return ground_truth
