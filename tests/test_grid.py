"""Grids: a toy field with two channels on a plane and on a sphere with land, against closed forms and against the dense."""

import math
import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pnpda_nb.classical import LETKF, LocalEnKF
from pnpda_nb.core import Grid, Homogeneous, gaspari_cohn, stream, tapers
from pnpda_nb.core.grid import as_grid
from pnpda_nb.core.localisation import neighbours
from pnpda_nb.core.padding import convolution
from pnpda_nb.dynamics import KuramotoSivashinsky, Lorenz63, Lorenz96
from pnpda_nb.files import Axis, Field, Layout
from pnpda_nb.flow_matching import ConvolutionNetwork, PyramidNetwork
from pnpda_nb.methods import method_by_name
from pnpda_nb.observing import DiagonalCovariance, ObservingNetwork, Select
from pnpda_nb.twin import TwinExperiment

DOUBLE = torch.float64
EARTH = 6_371_000.0
LATITUDE = tuple(-75.0 + 30 * k for k in range(6))
LONGITUDE = tuple(30.0 * k for k in range(12))
LAND = torch.zeros(6, 12, dtype=torch.bool)
LAND[1:5, 3:6] = True
PLANE = Grid((6, 8), "circular", spacing=(2.0, 3.0), channels=("bottom", "top"))
GLOBE = Grid.sphere(LATITUDE, LONGITUDE, channels=("u", "v"), land=LAND)
CHANNEL = Grid((5, 8), ("zeros", "circular"), spacing=(30.0, 20.0), channels=2, land=torch.arange(40).reshape(5, 8) % 7 == 3)
GRIDS = {
    "ring": as_grid("ring", 20),
    "line": as_grid("line", 20),
    "plane": PLANE,
    "globe": GLOBE,
    "channel": CHANNEL,
    "basin": Grid((7, 5), "reflected", coordinates=((0.0, 1.0, 3.0, 4.0, 8.0, 9.0, 10.0), (5.0, 4.0, 2.0, 1.0, 0.0))),
    "region": Grid.sphere((40.0, 50.0, 55.0), (350.0, 355.0, 360.0, 365.0)),
}
CIRCULAR = ("ring", "plane", "globe", "channel")


def randn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=stream(seed, "test grid"), dtype=DOUBLE).to(dtype)


def every(grid):
    n = torch.arange(grid.dim)
    return grid(n[:, None], n)


def by_hand(grid, i, j):
    """The distance of two numbers, in plain Python."""
    a, b = (grid.positions[k].tolist() for k in (i, j))
    if grid.radius is not None:  # the spherical law of cosines
        p, q, turn = math.radians(a[0]), math.radians(b[0]), math.radians(a[1] - b[1])
        cosine = math.sin(p) * math.sin(q) + math.cos(p) * math.cos(q) * math.cos(turn)
        return grid.radius * math.acos(max(-1.0, min(1.0, cosine)))
    gaps = [abs(x - y) for x, y in zip(a, b)]
    return math.hypot(*(gap if period is None else min(gap, period - gap) for gap, period in zip(gaps, grid.periods)))


# what a state is


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_that_states_become_fields_and_states_again_to_the_bit(name, dtype):
    grid = GRIDS[name]
    states = randn(3, 2, grid.dim, dtype=dtype)
    fields = grid.unflatten(states)
    assert fields.shape == (3, 2, len(grid.channels), *grid.shape) and fields.dtype == dtype
    assert torch.equal(grid.flatten(fields), states)
    assert torch.equal(grid.flatten(grid.unflatten(states, 0.0)), states)
    assert grid.unflatten(states, 0.0).isfinite().all()


def test_that_land_is_nan_or_what_fills_it_and_has_no_place_in_the_state():
    assert GLOBE.dim == 2 * (72 - 12)
    fields = GLOBE.unflatten(torch.arange(GLOBE.dim).double())
    assert torch.equal(fields.isnan(), LAND.expand(2, 6, 12))
    assert fields[~fields.isnan()].tolist() == list(range(GLOBE.dim))  # channel by channel, in C order
    assert (GLOBE.unflatten(torch.ones(GLOBE.dim), 7.0)[:, LAND] == 7).all()


def test_that_land_may_differ_between_channels():
    land = torch.stack((torch.zeros(6, 8), torch.eye(6, 8))).bool()
    grid = replace(PLANE, land=land)
    assert grid.dim == 96 - 6
    n = torch.arange(grid.dim)
    assert torch.equal(grid.channel, (n >= 48).long())
    torch.testing.assert_close(grid.flatten(PLANE.unflatten(torch.arange(96.0))), torch.arange(96.0)[~land.flatten()])


def test_that_gradients_go_through_fields():
    states = randn(GLOBE.dim).requires_grad_()
    GLOBE.unflatten(states, 0.0).square().sum().backward()
    torch.testing.assert_close(states.grad, 2 * states.detach())


@pytest.mark.parametrize("name", GRIDS)
def test_that_the_nearest_number_to_a_place_of_the_grid_is_there_and_to_any_place_is_the_nearest(name):
    grid = GRIDS[name]
    for channel in range(len(grid.channels)):
        own = (grid.channel == channel).nonzero().squeeze(-1)
        assert torch.equal(grid.nearest(grid.positions[own], channel), own)
        low, high = grid.positions.amin(0), grid.positions.amax(0)
        places = low + (high - low) * torch.rand(40, len(grid.shape), generator=stream(1), dtype=DOUBLE)
        found = grid.apart(places, grid.positions[grid.nearest(places, channel)])
        torch.testing.assert_close(found, grid.apart(places[:, None], grid.positions[own]).amin(-1))


def test_that_grids_that_say_the_same_are_one_and_survive_a_pickle():
    again = Grid.sphere(list(LATITUDE), torch.tensor(LONGITUDE), channels=("u", "v"), land=LAND.clone())
    assert again == GLOBE and hash(again) == hash(GLOBE) and pickle.loads(pickle.dumps(GLOBE)) == GLOBE
    for other in ({"land": None}, {"radius": 1.0}, {"channels": 2}, {"metric": lambda i, j: (i - j).abs()}):
        assert replace(GLOBE, **other) != GLOBE
    neighbours.cache_clear()
    for grid in (GLOBE, again):
        neighbours(grid.dim, (0, 5), 1e6, grid)
    assert neighbours.cache_info().hits == 1


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Grid(()), "shape"),
        (lambda: Grid((2, 3, 4)), "shape"),
        (lambda: Grid((2, 0)), "shape"),
        (lambda: Grid((2, 3), ("circular",)), "edges"),
        (lambda: Grid((2, 3), "pole"), "edges"),
        (lambda: Grid((2, 3), spacing=(1.0, -1.0)), "spacing"),
        (lambda: Grid(3, channels=("a", "a")), "channels"),
        (lambda: Grid(3, coordinates=((0.0, 1.0),)), "coordinates"),
        (lambda: Grid(3, coordinates=((0.0, 2.0, 1.0),)), "coordinates"),
        (lambda: Grid(3, "circular", coordinates=((0.0, 1.0, 5.0),)), "coordinates"),
        (lambda: Grid((2, 3), land=torch.zeros(3, 2, dtype=torch.bool)), "land"),
        (lambda: Grid((2, 3), land=torch.ones(2, 3, dtype=torch.bool)), "land"),
        (lambda: Grid.sphere((0.0, 95.0), (0.0, 1.0)), "coordinates"),
        (lambda: Grid((2, 3), radius=1.0), "radius"),
        (lambda: as_grid("circle", 4), "distance"),
        (lambda: as_grid(PLANE, 4), "distance"),
        (lambda: PLANE.unflatten(torch.zeros(95)), "states"),
        (lambda: PLANE.flatten(torch.zeros(2, 8, 6)), "fields"),
        (lambda: PLANE.pad(torch.zeros(6, 8), 1), "fields"),
        (lambda: GRIDS["basin"].pad(torch.zeros(1, 7, 5), 5), "width"),
        (lambda: Homogeneous(GRIDS["basin"], torch.exp), "grid"),
        (lambda: Homogeneous(PLANE, lambda r: torch.exp(-r), torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "variance"),
        (lambda: Homogeneous(GLOBE, lambda r: torch.exp(-r)).solve(torch.zeros(GLOBE.dim)), "grid"),
        (lambda: Homogeneous(PLANE, lambda r: torch.exp(-(r**2) / 50)).solve(torch.zeros(PLANE.dim)), "correlation"),
        (lambda: neighbours(PLANE.dim, (96,), 1.0, PLANE), "sites"),
    ],
)
def test_that_what_does_not_fit_together_is_refused_by_name(make, argument):
    with pytest.raises(ValueError, match=f"^{argument}"):
        make()


# distances


def test_that_distances_have_their_closed_forms():
    assert PLANE(torch.tensor(0), torch.tensor(8 * 5 + 7)) == math.hypot(2, 3)  # across both seams
    assert PLANE(torch.tensor(3), torch.tensor(48 + 3)) == 0  # above one another
    degrees = replace(Grid.sphere(LATITUDE, LONGITUDE), radius=math.degrees(1))
    around = degrees(torch.tensor(2 * 12), torch.arange(2 * 12, 3 * 12))
    chord = math.cos(math.radians(15)) * torch.sin(torch.deg2rad(torch.tensor(LONGITUDE, dtype=DOUBLE)) / 2)
    torch.testing.assert_close(around, torch.rad2deg(2 * torch.asin(chord)))
    torch.testing.assert_close(degrees(torch.tensor(0), torch.tensor(6)), torch.tensor(30.0, dtype=DOUBLE))  # over the south pole
    torch.testing.assert_close(degrees(torch.tensor(0), torch.tensor(5 * 12 + 6)), torch.tensor(180.0, dtype=DOUBLE))
    metres = GLOBE(torch.tensor(0), torch.tensor(1))
    torch.testing.assert_close(metres, degrees(torch.tensor(0), torch.tensor(1)) * math.pi / 180 * EARTH)


@pytest.mark.parametrize("name", GRIDS)
def test_that_distances_are_those_found_one_by_one_and_a_metric(name):
    grid = GRIDS[name]
    d = every(grid)
    hand = torch.tensor([[by_hand(grid, i, j) for j in range(grid.dim)] for i in range(grid.dim)], dtype=DOUBLE)
    torch.testing.assert_close(d, hand, atol=1e-7 * float(hand.max()), rtol=1e-7)
    assert torch.equal(d, d.T) and (d.diagonal() == 0).all() and d.min() == 0
    assert (d[:, :, None] <= d[:, None, :] + d.T[None] + 1e-9 * d.max()).all()  # no way round is shorter


places = st.lists(st.floats(-500, 500), min_size=6, max_size=6)


@given(places, st.integers(-3, 3), st.integers(-3, 3))
def test_that_distances_of_any_places_are_symmetric_periodic_and_obey_the_triangle(numbers, up, right):
    a, b, c = torch.tensor(numbers, dtype=DOUBLE).reshape(3, 2)
    turned = torch.tensor([up, right]).double() * torch.tensor(PLANE.periods, dtype=DOUBLE)
    assert PLANE.apart(a, b) == PLANE.apart(b, a) <= math.hypot(6, 12)
    assert PLANE.apart(a, c) <= PLANE.apart(a, b) + PLANE.apart(b, c) + 1e-9
    torch.testing.assert_close(PLANE.apart(a + turned, b), PLANE.apart(a, b), atol=1e-9, rtol=0)
    a, b, c = (torch.stack((90 * torch.sin(x[0]), x[1])) for x in (a, b, c))
    assert GLOBE.apart(a, b) == GLOBE.apart(b, a) <= math.pi * EARTH * (1 + 1e-15)
    assert GLOBE.apart(a, c) <= GLOBE.apart(a, b) + GLOBE.apart(b, c) + 1e-3
    whole = torch.tensor([0.0, 360.0 * right], dtype=DOUBLE)
    torch.testing.assert_close(GLOBE.apart(a + whole, b + up), GLOBE.apart(a, b + up), atol=1e-3, rtol=0)


@given(st.integers(0, 47), st.integers(0, 47), st.integers(0, 5), st.integers(0, 7))
def test_that_distances_on_a_plane_do_not_change_when_both_ends_move(i, j, down, right):
    def moved(k):
        return torch.tensor((k // 8 + down) % 6 * 8 + (k % 8 + right) % 8)

    torch.testing.assert_close(PLANE(moved(i), moved(j)), PLANE(torch.tensor(i), torch.tensor(j)))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, math.inf])
def test_that_neighbours_are_those_of_the_dense_distances(name, share):
    grid, sites = GRIDS[name], tuple(range(0, GRIDS[name].dim, 3))
    d = every(grid)[:, list(sites)]
    reach = share * float(d.max()) * (1 + 1e-6) if share else 0.0
    number, apart = neighbours(grid.dim, sites, reach, grid)
    for i in range(grid.dim):
        there = torch.isfinite(apart[i])
        assert number[i][there].tolist() == (d[i] <= reach).nonzero().squeeze(-1).tolist()
        torch.testing.assert_close(apart[i][there], d[i][number[i][there]])


@pytest.mark.parametrize("name", GRIDS)
def test_that_tapers_are_gaspari_and_cohns_function_of_distance_and_correlations(name):
    grid = GRIDS[name]
    sites, d = tuple(range(0, grid.dim, 2)), every(grid)
    half_width = 0.24 * min([p for p in grid.periods if p and grid.radius is None], default=float(d.max()))
    between, among = tapers(grid.dim, sites, half_width, grid)
    torch.testing.assert_close(between, gaspari_cohn(d[:, ::2], half_width))
    torch.testing.assert_close(among, between[::2])
    assert torch.linalg.eigvalsh(tapers(grid.dim, tuple(range(grid.dim)), half_width, grid)[1])[0] > -1e-9


def test_that_a_taper_that_meets_itself_on_a_torus_is_still_a_correlation_and_the_same_everywhere():
    wide = tapers(PLANE.dim, tuple(range(PLANE.dim)), 5.0, PLANE)[1]
    values = torch.linalg.eigvalsh(wide)
    assert values[0] > -1e-12 and torch.allclose(wide.diagonal(), torch.ones(96, dtype=DOUBLE))
    fields = wide.reshape(2, 6, 8, 2, 6, 8)
    torch.testing.assert_close(fields, fields.roll((1, 3, 1, 3), (1, 2, 4, 5)))


def test_that_a_users_own_metric_on_a_grid_may_give_levels_a_height():
    def with_height(i, j):
        return torch.hypot(PLANE(i, j), 4.0 * (PLANE.channel[i] - PLANE.channel[j]).abs().double())

    tall = replace(PLANE, metric=with_height)
    assert tall(torch.tensor(0), torch.tensor(48)) == 4
    number, apart = neighbours(96, (0, 50), 3.0, tall)
    assert apart[48].isfinite().sum() == 0 and torch.isfinite(apart[0]).sum() == 1


# localisation


def dense_letkf(background, observations, grid, half_width, inflation):
    """Hunt et al. (2007), one variable after the other, with matrices."""
    members, dim = background.shape
    sites, R = list(observations.operator.sites), observations.covariance.variances
    mean, seen = background.mean(0), background[:, sites]
    X, Y, y = background - mean, seen - seen.mean(0), observations.values - seen.mean(0)
    rho, analysis = gaspari_cohn(every(grid)[:, sites], half_width), torch.empty_like(background)
    for i in range(dim):
        C = (Y / R) * rho[i]
        P = torch.linalg.inv((members - 1) * torch.eye(members, dtype=DOUBLE) + C @ Y.T)
        values, vectors = torch.linalg.eigh((members - 1) * P)
        W = (vectors * values.sqrt()) @ vectors.T + (P @ C @ y)[:, None]
        analysis[:, i] = mean[i] + X[:, i] @ W
    centre = analysis.mean(0)
    return centre + inflation * (analysis - centre)


@pytest.mark.parametrize("name", ["plane", "globe", "channel"])
def test_that_an_letkf_on_a_grid_is_the_dense_localised_update(name):
    grid = GRIDS[name]
    network = ObservingNetwork(
        Select(tuple(range(1, grid.dim, 4)), grid.dim), DiagonalCovariance([0.5] * len(range(1, grid.dim, 4)))
    )
    background, observations = randn(7, grid.dim), network.report(randn(network.operator.size, seed=1))
    half_width = float(every(grid).max()) / 4
    ours = LETKF(half_width=half_width, distance=grid, inflation=1.05).analyse(
        background, observations, forecast=None, generator=None
    )
    torch.testing.assert_close(ours, dense_letkf(background, observations, grid, half_width, 1.05))


def test_that_covariance_localisation_on_a_globe_is_the_schur_product():
    sites = tuple(range(0, GLOBE.dim, 5))
    network = ObservingNetwork(Select(sites, GLOBE.dim), DiagonalCovariance([1e-8] * len(sites)))
    background = randn(9, GLOBE.dim)
    observations = network.report(randn(len(sites), seed=1))
    method = LocalEnKF(half_width=4e6, distance=GLOBE)
    ours = method.analyse(background, observations, forecast=None, generator=stream(1))
    X = background - background.mean(0)
    B = gaspari_cohn(every(GLOBE), 4e6) * (X.T @ X) / 8
    K = B[:, list(sites)] @ torch.linalg.inv(B[list(sites)][:, list(sites)] + 1e-8 * torch.eye(len(sites), dtype=DOUBLE))
    expected = background + (observations.values - background[:, list(sites)]) @ K.T
    torch.testing.assert_close(ours, expected, atol=2e-2, rtol=0)  # but for errors of 1e-4 in perturbed observations


def test_that_a_ring_is_the_grid_that_its_name_says():
    network = ObservingNetwork(Select((0, 7, 13), 20), DiagonalCovariance([0.5] * 3))
    background, observations = randn(5, 20), network.report(randn(3, seed=1))
    answers = [
        LETKF(half_width=2.0, distance=distance).analyse(background, observations, forecast=None, generator=None)
        for distance in ("ring", Grid(20, "circular"), GRIDS["ring"].__call__)
    ]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


# beyond the edges


def test_that_padding_goes_over_the_pole_to_the_same_places():
    open_sea = replace(GLOBE, land=None)
    wide = open_sea.pad(open_sea.places.movedim(-1, 0), 2)
    beyond = torch.tensor([-135.0, -105.0, *LATITUDE, 105.0, 135.0], dtype=DOUBLE)
    there = torch.stack(torch.meshgrid(beyond, torch.arange(-60.0, 420, 30).double(), indexing="ij"), -1)
    assert wide.shape == (2, 10, 16)
    assert open_sea.apart(wide.movedim(0, -1), there).max() < 1e-6 * EARTH  # latitudes of more than 90 are on the other side


def test_that_components_of_vectors_change_sign_over_the_pole_and_scalars_do_not():
    fields = randn(3, 2, 6, 12)
    open_sea = replace(GLOBE, land=None)
    plain, flipped = open_sea.pad(fields, 1), open_sea.pad(fields, 1, flip=(1,))
    assert torch.equal(plain[:, 0], flipped[:, 0])
    assert torch.equal(plain[:, 1, 1:-1], flipped[:, 1, 1:-1]) and torch.equal(plain[:, 1, [0, -1]], -flipped[:, 1, [0, -1]])
    assert torch.equal(plain[..., 0, 1:-1], fields[..., 0, :].roll(6, -1))


def test_that_a_row_on_the_pole_is_not_met_twice():
    grid = Grid.sphere((90.0, 45.0, 0.0, -45.0, -90.0), (0.0, 90.0, 180.0, 270.0))
    assert grid.edges == ("pole", "circular") and grid.on_pole == (True, True)
    fields = randn(1, 5, 4)
    wide = grid.pad(fields, 1)
    assert torch.equal(wide[0, 0, 1:-1], fields[0, 1].roll(2)) and torch.equal(wide[0, -1, 1:-1], fields[0, 3].roll(2))


def test_that_a_flow_along_a_great_circle_is_continuous_over_the_pole():
    grid = Grid.sphere(tuple(-88.0 + 4 * k for k in range(45)), tuple(4.0 * k for k in range(90)))
    latitude, longitude = torch.deg2rad(grid.places).unbind(-1)
    # solid rotation about an axis through the equator: near the pole, a straight wind
    wind = torch.stack((-torch.sin(latitude) * torch.cos(longitude), torch.sin(longitude)))
    wide = replace(grid, channels=2).pad(wind, 1, flip=(0, 1))
    assert wide.diff(dim=-2).abs().max() < 0.08  # as smooth there as elsewhere
    assert replace(grid, channels=2).pad(wind, 1).diff(dim=-2).abs().max() > 1


@pytest.mark.parametrize("edge", ["circular", "zeros", "reflected"])
def test_that_padding_is_torchs_own_where_torch_has_it(edge):
    fields = randn(2, 3, 6, 8)
    mode = {"circular": "circular", "zeros": "constant", "reflected": "reflect"}[edge]
    ours = Grid((6, 8), edge, channels=3).pad(fields, 2)
    assert torch.equal(ours, torch.nn.functional.pad(fields, (2, 2, 2, 2), mode=mode))


# covariances that are the same everywhere


def homogeneous(name, dtype=DOUBLE):
    grid = GRIDS[name]
    scale = 0.15 * float(every(grid).max())
    between = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=dtype) if len(grid.channels) == 2 else 2.0
    return Homogeneous(grid, lambda r: torch.exp(-r / scale), between)


def dense(covariance):
    n = torch.arange(covariance.size)
    return covariance.between(n, n)


@pytest.mark.parametrize("name", CIRCULAR)
def test_that_a_homogeneous_covariance_is_the_dense_one(name):
    covariance = homogeneous(name)
    grid, C, x = covariance.grid, dense(covariance), randn(2, 3, covariance.size)
    scale = 0.15 * float(every(grid).max())
    between = torch.as_tensor(covariance.variance, dtype=DOUBLE).expand(len(grid.channels), len(grid.channels))
    wanted = torch.exp(-every(grid) / scale) * between[grid.channel[:, None], grid.channel]
    near = every(grid) < 0.3 * every(grid).max()
    torch.testing.assert_close(C[near], wanted[near], atol=0.02, rtol=0)  # but for what is negative in the spectrum
    torch.testing.assert_close(C.diagonal(), wanted.diagonal())
    assert torch.allclose(C, C.T) and torch.linalg.eigvalsh(C)[0] > -1e-12
    torch.testing.assert_close(covariance.multiply(x), x @ C)
    torch.testing.assert_close(covariance.root(covariance.root_transposed(x)), x @ C)
    if grid.land is None:
        torch.testing.assert_close(covariance.root(covariance.root(x)), x @ C)
        torch.testing.assert_close(covariance.solve(x), torch.linalg.solve(C, x.unsqueeze(-1)).squeeze(-1))


@pytest.mark.parametrize("name", ["plane", "globe"])
def test_that_draws_have_the_moments_of_the_covariance(name):
    covariance = homogeneous(name)
    draws, C = covariance.draw((20_000,), stream(1, "draws")), dense(covariance)
    spread = (C.diagonal()[:, None] * C.diagonal() + C**2).sqrt() / 20_000**0.5  # standard error of a sample covariance
    off = (draws.T @ draws / 20_000 - C) / spread
    assert off.abs().max() < 5.5 and 0.9 < off.square().mean() < 1.1
    assert ((draws.mean(0) / (C.diagonal() / 20_000).sqrt()).abs() < 5).all()


def test_that_a_gaussian_on_a_plane_without_land_is_invariant_under_shifts():
    covariance = homogeneous("plane")
    fields = PLANE.unflatten(randn(2, 96))
    moved = covariance.multiply(PLANE.flatten(fields.roll((2, 3), (-2, -1))))
    torch.testing.assert_close(
        PLANE.unflatten(moved), PLANE.unflatten(covariance.multiply(PLANE.flatten(fields))).roll((2, 3), (-2, -1))
    )


def test_that_land_takes_rows_and_columns_away_and_changes_no_draw_elsewhere():
    bare = homogeneous("globe")
    whole = Homogeneous(replace(GLOBE, land=None), bare.correlation, bare.variance)
    kept = (~LAND).expand(2, 6, 12).flatten()
    torch.testing.assert_close(dense(bare), dense(whole)[kept][:, kept])
    assert torch.equal(bare.draw((3,), stream(2)), whole.draw((3,), stream(2))[:, kept])


def test_that_single_precision_stays_and_is_near_double():
    covariance, x = homogeneous("plane"), randn(3, 96)
    for deed in (covariance.multiply, covariance.solve, covariance.root):
        short = deed(x.float())
        assert short.dtype == torch.float32
        torch.testing.assert_close(short.double(), deed(x), rtol=1e-4, atol=1e-4)
    assert GLOBE.pad(GLOBE.unflatten(randn(1, GLOBE.dim, dtype=torch.float32), 0.0), 1).dtype == torch.float32


def test_that_a_large_plane_needs_no_matrix():
    grid = Grid((256, 256), "circular", channels=2)
    covariance = Homogeneous(grid, lambda r: gaspari_cohn(r, 6.0))
    x = randn(2, grid.dim)
    torch.testing.assert_close(covariance.root(covariance.root(x)), covariance.multiply(x))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_that_nothing_leaves_the_device_or_the_precision_of_the_states(dtype):
    elsewhere = torch.zeros(3, GLOBE.dim, device="meta", dtype=dtype)  # a device on which nothing else is
    fields = GLOBE.unflatten(elsewhere, 0.0)
    covariance = homogeneous("globe")
    answers = [fields, GLOBE.flatten(fields), GLOBE.pad(fields, 2, (0,)), covariance.multiply(elsewhere)]
    answers.append(covariance.root(covariance.root_transposed(elsewhere)))
    for answer in answers:
        assert answer.device.type == "meta" and answer.dtype == dtype
    i = torch.zeros(3, device="meta", dtype=torch.long)
    assert GLOBE(i, i).device.type == "meta"


# convolutions


def stack(edges, on_pole=(False, False)):
    """A small residual network."""
    torch.manual_seed(0)
    convolve = [
        convolution(a, b, 3, edges=edges, dilation=d, on_pole=on_pole).double() for a, b, d in ((2, 5, 1), (5, 5, 2), (5, 2, 1))
    ]
    return lambda x: convolve[2](torch.tanh(convolve[1](torch.tanh(convolve[0](x)))))


@given(st.integers(0, 11), st.integers(0, 9))
def test_that_convolutions_on_a_torus_move_with_their_fields(down, right):
    network, fields = stack(("circular", "circular")), randn(2, 2, 12, 10)
    shift = (down, right), (-2, -1)
    torch.testing.assert_close(network(fields.roll(*shift)), network(fields).roll(*shift))


def test_that_convolutions_on_a_globe_move_along_it_and_see_over_the_pole():
    network, fields = stack(("pole", "circular")), randn(1, 2, 8, 12)
    torch.testing.assert_close(network(fields.roll(5, -1)), network(fields).roll(5, -1))
    other = fields.clone()
    other[..., 0, 6] += 1  # on the other side of the pole
    changed = (network(other) - network(fields))[0, 0].abs() > 1e-9
    assert changed[0, 0] and not changed[7].any()
    walls = stack(("zeros", "circular"))
    assert not ((walls(other) - walls(fields))[0, 0].abs() > 1e-9)[0, 0]


def test_that_a_convolution_between_walls_along_one_axis_only_is_the_padded_one():
    mixed = convolution(2, 3, 3, edges=("zeros", "circular")).double()
    fields = randn(2, 2, 5, 6)
    padded = torch.nn.functional.pad(torch.nn.functional.pad(fields, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
    torch.testing.assert_close(mixed(fields), torch.nn.functional.conv2d(padded, mixed.weight, mixed.bias))


# files


def test_that_a_layout_of_a_file_says_a_grid():
    turned = tuple(90.0 - 22.5 * k for k in range(9)), tuple((30.0 * k + 180) % 360 - 180 for k in range(12))
    axes = {"lat": Axis(turned[0], "degrees_north"), "lon": Axis(turned[1], "degrees_east")}
    layout = Layout((Field("h", (9, 12), ("lat", "lon")), Field("s", (9, 12), ("lat", "lon"))), axes, left_out=np.array([0, 150]))
    grid = layout.grid
    assert grid.edges == ("pole", "circular") and grid.on_pole == (True, True) and grid.dim == 214 and grid.radius == EARTH
    states = randn(3, 214)
    for name, field in zip(("h", "s"), grid.unflatten(states).unbind(1)):
        assert torch.equal(field.nan_to_num(9.0), layout.split(states)[name].nan_to_num(9.0))
    region = Layout((Field("x", (3, 4), ("y", "lon")),), {"lon": Axis((358.0, 359.0, 0.0, 1.0), "degrees_east")}).grid
    assert region.edges == ("zeros", "zeros") and region(torch.tensor(0), torch.tensor(3)) == 3
    ring = Layout((Field("x", (5,), ("site",)),), {"site": Axis((0.0, 2.0, 4.0, 6.0, 8.0), "", 10.0)}).grid
    assert ring.periods == (10.0,) and ring(torch.tensor(0), torch.tensor(4)) == 2
    assert torch.equal(every(Layout.plain(7).grid), every(as_grid("line", 7)))
    with pytest.raises(ValueError, match="^fields"):
        Layout((Field("x", (3,), ("a",)), Field("y", (3,), ("b",)))).grid  # noqa: B018


# networks


def network(kind, boundary, channels=2):
    sizes = {"levels": 3} if kind is PyramidNetwork else {"dilations": (1, 2)}
    made = kind(channels, 2, stream(1), boundary=boundary, width=6, kernel=3, **sizes)
    for parameter in made.last.parameters():  # an untrained network answers zero
        parameter.data.normal_(generator=stream(2)).mul_(0.3)
    return made.eval().requires_grad_(False).double()


TAU = torch.full((1,), 0.4, dtype=DOUBLE)


@pytest.mark.parametrize(("kind", "step"), [(ConvolutionNetwork, 1), (PyramidNetwork, 4)])
@given(st.integers(0, 5), st.integers(0, 5))
def test_that_a_network_on_a_torus_moves_with_its_fields(kind, step, down, right):
    made, fields = network(kind, Grid((16, 8), "circular")), randn(3, 2, 16, 8)
    shift = (down * step, right * step), (-2, -1)
    answer = made(fields, TAU)
    assert answer.std() > 0.01
    torch.testing.assert_close(made(fields.roll(*shift), TAU), answer.roll(*shift))


@pytest.mark.parametrize("kind", [ConvolutionNetwork, PyramidNetwork])
def test_that_a_network_on_a_globe_moves_along_it_and_its_weights_fit_a_finer_one(kind):
    made = network(kind, Grid.sphere(LATITUDE, LONGITUDE))
    for shape in ((8, 12), (16, 32)):
        fields = randn(2, 2, *shape)
        torch.testing.assert_close(made(fields.roll(4, -1), TAU), made(fields, TAU).roll(4, -1))
    other = fields.clone()
    other[..., 0, 0] += 1
    assert (made(other, TAU) - made(fields, TAU))[..., 0, 16].abs().max() > 1e-6  # over the pole


@pytest.mark.parametrize("kind", [ConvolutionNetwork, PyramidNetwork])
def test_that_a_channel_knows_its_walls_and_a_basin_any_size(kind):
    made = network(kind, CHANNEL)
    fields = torch.ones(1, 2, 13, 16, dtype=DOUBLE)
    answer = made(fields, TAU)
    torch.testing.assert_close(answer, answer[..., :1].expand_as(answer))  # the same along the circle, not across it
    assert answer[0, 0, :, 0].diff().abs().max() > 1e-3
    assert network(kind, Grid((5, 5)))(randn(3, 1, 2, 7, 11), TAU).shape == (3, 1, 2, 7, 11)


@pytest.mark.parametrize("kind", [ConvolutionNetwork, PyramidNetwork])
def test_that_states_with_land_go_through_a_network_and_back(kind):
    grid = Grid.sphere(
        tuple(-78.75 + 22.5 * k for k in range(8)), LONGITUDE, channels=2, land=torch.arange(96).reshape(8, 12) % 11 == 5
    )
    made, states = network(kind, grid, channels=3), randn(4, grid.dim)
    sea = (~grid.land[:1]).double().expand(4, 1, 8, 12)
    answer = grid.flatten(made(torch.cat((grid.unflatten(states, 0.0), sea), 1), TAU))
    assert answer.shape == states.shape and answer.isfinite().all()


def test_that_what_is_too_short_is_refused():
    for kind in (ConvolutionNetwork, PyramidNetwork):
        with pytest.raises(ValueError, match="^fields: expected a ring"):
            network(kind, Grid((16, 16), "circular"))(randn(1, 2, 16, 1), TAU)
        with pytest.raises(ValueError, match="^boundary"):
            kind(2, 2, None, boundary="sphere")


@dataclass(frozen=True)
class OnAPlane:
    """A model of a field that stands still."""

    grid: Grid = PLANE
    dim: int = PLANE.dim
    dt: float = 1.0
    names: tuple = ()

    def step(self, state):
        return state


def test_that_models_know_where_their_numbers_are_and_local_methods_ask_them():
    walls, ring = (KuramotoSivashinsky(dim=31, boundary=b).grid for b in ("hinged", "periodic"))
    assert torch.allclose(walls.positions[:, 0], 50 / 32 * torch.arange(1, 32, dtype=DOUBLE))
    first, second, last = torch.tensor([0]), torch.tensor([1]), torch.tensor([30])
    assert torch.allclose(ring(first, last), ring(first, second)) and torch.allclose(walls(first, last), 30 * walls(first, second))
    assert Lorenz96(12).grid == Grid(12, "circular") and not hasattr(Lorenz63(), "grid")

    def distance(model) -> Grid | str:
        network = ObservingNetwork(Select((0,), model.dim), DiagonalCovariance([1.0]))
        return method_by_name("letkf", TwinExperiment("x", model, model, network, 1, 1, (0.0,) * model.dim)).distance

    assert [distance(m) for m in (OnAPlane(), KuramotoSivashinsky(), Lorenz96(12), Lorenz63())] == [PLANE, "line", "ring", "ring"]
