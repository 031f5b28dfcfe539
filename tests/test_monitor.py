"""A watch on innovations: what it says of numbers whose law is known."""

import pytest
import torch

from pnpda_nb.classical import EnKF
from pnpda_nb.core import standard_normal, stream
from pnpda_nb.files import Field, Layout
from pnpda_nb.observing import DiagonalCovariance, Observations, Select
from pnpda_nb.operations.monitor import Monitor, Watched, _Groups, _limit


def watched(rows, group=None, **settings):
    monitor = Monitor(["u", "v"], **{"calibration": 60} | settings)
    log = [(k, *a) for k, row in enumerate(rows) for a in monitor.see(row, torch.ones_like(row), group)]
    return monitor, log


def test_that_an_alarm_names_the_group_and_what_changed_and_ends_when_that_does():
    z, group = standard_normal((400, 40), stream(1)), torch.arange(40) % 2
    z[100:160, 1::2] += 0.8
    z[250:300, 0::2] *= 1.8
    monitor, log = watched(z, group)
    bias, size = log[0], next(a for a in log if a[2] == "size" and a[0] >= 200)
    assert 100 <= bias[0] < 112 and bias[1:3] == ("v", "bias") and 250 <= size[0] < 256 and size[1] == "u"
    assert not monitor.alarms and len(log) < 9


def test_that_what_is_wrong_from_the_beginning_is_usual():
    """Biased, too large and coloured innovations, of unknown variance: nothing of that is a change."""
    z = standard_normal((600, 20), stream(2))
    for k in range(1, len(z)):
        z[k] = 0.5 * z[k - 1] + z[k]
    monitor, log = watched(3 * z + 1, calibration=300)
    assert len(log) <= 2 and len(monitor.alarms) == 0
    assert watched(torch.cat([3 * z + 1, 3 * z[:30] + 4]), calibration=300)[1][-1][0] in range(600, 612)


def test_that_a_monitor_goes_on_from_its_state_and_nothing_seen_changes_nothing():
    z = standard_normal((120, 10), stream(3))
    whole, log = watched(z)
    one, other = watched(z[:80])[0], Monitor(["u", "v"], calibration=60)
    other = other.restored(one.state())
    said = [a for row in z[80:] for a in other.see(row, torch.ones_like(row))]
    assert torch.equal(other.level, whole.level) and [a[1:] for a in log if a[0] >= 80] == said
    before = whole.level.clone()
    none = z[0, :0]
    assert whole.see(none, none) == [] and torch.equal(before, whole.level)
    with pytest.raises(ValueError, match="state: expected that of a monitor of u, v, got another"):
        whole.restored({})


@pytest.mark.parametrize("chance", [1e-2, 1e-4])
def test_that_limits_are_those_of_the_normal_law(chance):
    z = standard_normal((2_000_000, 3), stream(4))
    beyond = torch.maximum((z[:, 0].square() + z[:, 2].clamp_min(0).square()).sqrt(), z[:, 1].abs()) > _limit(chance, 1e9)
    assert abs(float(beyond.double().mean()) / chance - 1) < 5 * (chance * len(z)) ** -0.5 + 0.02


def test_that_groups_are_fields_or_stretches_of_them():
    layout = Layout((Field("T", (4, 3), ("y", "x")), Field("u", (3,), ("x",))))
    assert _Groups.by_region(layout).names == ("T", "u")
    cut = _Groups.by_region(layout, 2)
    assert cut.names[0] == "T (y 0 to 1)" and cut.number.tolist() == 6 * [0] + 6 * [1] + [2, 2, 3]


def test_that_the_fallback_has_the_weight_while_an_alarm_lasts():
    scheme = Watched(EnKF(), EnKF(), 4, settings={"calibration": 40})
    runs, R = 2, DiagonalCovariance(torch.ones(3))
    for k in range(60):
        states = standard_normal((runs, 10, 3), stream(5, k))
        values = standard_normal((runs, 3), stream(6, k)) * (torch.tensor([[1.0], [30.0 if k >= 50 else 1.0]]))
        seen = Observations(values.double(), Select((0, 1, 2), 3), R)
        analysis, weights = scheme.analyse(states, seen, forecast=None, generator=stream(7, k))
        assert torch.allclose(weights.sum(1), torch.ones(runs).double())
    assert weights[0].tolist() == 4 * [0.25] + 6 * [0.0] and weights[1, :4].sum() == 0
    assert torch.allclose(analysis[1, :4].mean(0), analysis[1, 4:].mean(0))
    assert {group for _, group, *_ in scheme.log} == {"run 1"}
    with pytest.raises(ValueError, match="background: expected .* more than 4 members"):
        scheme.analyse(states[:, :4], seen, forecast=None, generator=stream(7))


def test_that_wrong_arguments_are_named():
    z = torch.ones(3).double()
    for given, said in (
        ({"calibration": 10}, "calibration: expected at least 30 cycles, got 10"),
        ({"memory": 0.0}, "memory: expected"),
        ({"false_alarms": 2.0}, "false_alarms: expected"),
    ):
        with pytest.raises(ValueError, match=said):
            Monitor(["u"], **given)
    with pytest.raises(ValueError, match="groups: expected at least one"):
        Monitor([])
    with pytest.raises(ValueError, match="group: expected a number from 0 to 0"):
        Monitor(["u"]).see(z, z, torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="variance: expected"):
        Monitor(["u"]).see(z, -z)
