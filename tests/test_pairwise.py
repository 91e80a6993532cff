"""The helper that picks few of many cases: no pair of values is lost."""

import itertools

from pairwise import columns, pairwise

CASES = [case for case in itertools.product("abcd", (1, 2, 3), (False, True), "xyz") if case[:2] != ("a", 3)]


def pairs(case):
    return set(itertools.combinations(enumerate(case), 2))


def test_each_is_the_first_of_those_that_add_the_most():
    left = set().union(*map(pairs, CASES))
    for case in pairwise(CASES):
        assert case == max(CASES, key=lambda other: len(pairs(other) & left))
        left -= pairs(case)
    assert not left


def test_a_case_that_is_there_twice_is_taken_once():
    assert pairwise([(1, 2), (1, 2), (3, 4)]) == [(1, 2), (3, 4)]
    assert pairwise([]) == []


def test_columns_of_a_case():
    options, other = {}, {}
    assert (
        columns([("adamw", None, True), 0.5]) == columns([("adamw", None), (True, 0.5)]) == ("adamw", None, True, 0.5)
    )
    assert columns([options, len]) == columns([options, len]) != columns([other, len])
    assert len(columns([("adamw", options), "clip"])) == 2
