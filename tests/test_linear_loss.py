"""The losses behind a linear head: gradients through their backward, shapes that fill no chunk."""

import pytest
import torch

from tailor_engine.ops import _linear_chunks, linear_kl, linear_kl_topk
from tailor_engine.ops._op import LEVELS, backend, unavailable

HERE = [level for level in LEVELS[:3] if not unavailable(level)]


def setting(tokens=7, hidden=5, vocabulary=11):
    """Return student states and head, teacher states and head; the student's want gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, hidden), (vocabulary, hidden)] * 2
    student, head, teacher, teacher_head = (
        torch.randn(shape, generator=generator) for shape in shapes
    )
    return student.requires_grad_(), head.requires_grad_(), teacher, teacher_head


def gradients(call, *leaves):
    """Run a backward and return the gradients that it leaves."""
    for leaf in leaves:
        leaf.grad = None
    call()
    return [leaf.grad.clone() for leaf in leaves]


def test_the_gradient_is_handed_over_scaled_and_not_copied():
    student, head, *teacher = setting()
    plain = gradients(lambda: linear_kl(student, head, *teacher).backward(), student, head)
    scaled = gradients(lambda: (3 * linear_kl(student, head, *teacher)).backward(), student, head)
    for once, thrice in zip(plain, scaled, strict=True):
        torch.testing.assert_close(thrice, 3 * once)

    loss = linear_kl(student, head, *teacher)
    kept = loss.grad_fn.saved_tensors[1].data_ptr()
    head.grad = None
    (0.5 * loss).backward()
    assert head.grad.data_ptr() == kept


def test_a_kept_graph_gives_the_same_gradient_again():
    student, head, *teacher = setting()
    once = gradients(lambda: linear_kl(student, head, *teacher).backward(), student, head)

    def twice():
        loss = linear_kl(student, head, *teacher)
        (2 * loss).backward(retain_graph=True)
        head.grad.add_(0)  # a caller may write into what it was given
        (3 * loss).backward()

    for five, one in zip(gradients(twice, student, head), once, strict=True):
        torch.testing.assert_close(five, 5 * one)

    loss = linear_kl(student, head, *teacher)
    (first,) = torch.autograd.grad(loss, head, retain_graph=True)
    first.zero_()
    (second,) = torch.autograd.grad(loss, head)
    torch.testing.assert_close(second, once[1])


def test_outputs_of_the_bare_op_are_never_written():
    student, head, *teacher = setting()
    numbers = (None, None, "forward", 1.0, 0.0, 0.0, 0.0, True, True)
    loss, _, d_head = torch.ops.tailor_engine.linear_kl(student, head, *teacher, *numbers)
    before = d_head.clone()
    (3 * loss).backward()
    assert torch.equal(d_head, before)
    torch.testing.assert_close(head.grad, 3 * before)


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_chunks_of_any_size_give_one_result(level, dtype, monkeypatch):
    student, head, teacher, teacher_head = setting(tokens=131, hidden=50, vocabulary=215)
    labels = torch.arange(131) * 7 % 215
    labels[5::9] = -100
    listed = torch.log_softmax(teacher @ teacher_head.T, -1).topk(9)
    cast = [t.detach().to(dtype) for t in (student, head, teacher, teacher_head)]

    def run():
        a, b = (t.clone().requires_grad_() for t in cast[:2])
        loss = linear_kl(a, b, *cast[2:], labels, cross_entropy=0.3, divergence="jensen_shannon")
        loss = loss + linear_kl_topk(a, b, listed.indices, listed.values, labels)
        loss.backward()
        return loss.detach(), a.grad, b.grad

    with backend(level):
        whole, again = run(), run()
        assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
        monkeypatch.setattr(_linear_chunks, "CHUNK_BYTES", 60_000)
        monkeypatch.setattr(_linear_chunks, "BLOCK_BYTES", 5_000)
        parts = run()
    close = (
        {"rtol": 2e-2, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    )
    for whole_value, value in zip(whole, parts, strict=True):
        torch.testing.assert_close(value, whole_value, **close)


@pytest.mark.parametrize("level", HERE)
def test_both_ways_to_make_the_products_agree(level, monkeypatch):
    student, head, *teacher = setting(tokens=70, hidden=33, vocabulary=101)

    def run(own):
        monkeypatch.setattr(_linear_chunks, "own_products", lambda *_: own)
        loss = linear_kl(student, head, *teacher, temperature=2.0)
        return [loss.detach(), *torch.autograd.grad(loss, (student, head))]

    with backend(level):
        for ours, torchs in zip(run(True), run(False), strict=True):
            torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-7)
