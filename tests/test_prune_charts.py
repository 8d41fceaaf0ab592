"""The picture of a pruned network's shape says what stays of every layer."""

import re

from tailor_engine.io import _prune_charts, report

DETAILS = {
    "widths_before": [128, 128, 128, 128],
    "widths": [128, 96, 0, 0],
    "heads_before": [[2, 2]] * 4,
    "heads": [[2, 2], [0, 0], [2, 1], [0, 0]],
    "blocks_dropped": [3],
    "left_out": ["attention of block 1", "mlp of block 2"],
    "predicted_curve": [[0.9, 0.1], [0.8, 0.3]],
    "predicted_share": 0.85,
    "predicted_loss_rise_nats_total": 0.2,
}


def words(svg):
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_what_stays_and_what_was_expected():
    svg = _prune_charts.shapes(DETAILS, "milliseconds a token")
    shown = words(svg[: svg.index("</svg>")])
    assert shown.count("left out") == 2 and shown.count("block dropped") == 2
    assert "96" in shown and "2 × 1" in shown and "128" not in shown
    assert "chosen: 85 %, 0.2 nats" in shown and "milliseconds a token that stay, %" in shown
    assert "layer 1 none, layer 2 2 × 1" in svg


def test_without_a_search_there_is_no_curve():
    details = {k: v for k, v in DETAILS.items() if not k.startswith("predicted")}
    shown = words(_prune_charts.shapes(details, "parameters"))
    assert "96" in shown and not any("chosen" in text for text in shown)


def test_the_unit_is_the_budgets():
    for config, unit in (
        ({}, "parameters"),
        ({"bytes": 9}, "bytes"),
        ({"latency": 0.8}, "milliseconds a token"),
    ):
        assert f"{unit} that stay" in report._shapes({"details": DETAILS, "config": config})
    assert report._shapes({"details": {"widths": [1]}, "config": {}}) == ""  # of an older version
