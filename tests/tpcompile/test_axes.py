import pytest

from tpcompile.axes import NEG_INF, Factors, Placement, TokenSet, parse
from tpcompile.errors import Where


def test_the_notation_reads_as_factors() -> None:
    assert parse("b i k, b k j -> b i j") == ((("b", "i", "k"), ("b", "k", "j")), (("b", "i", "j"),))
    assert parse("b 1 n -> b n") == ((("b", None, "n"),), (("b", "n"),))
    assert parse("n -> ") == ((("n",),), ((),))


def test_notation_without_an_arrow_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        parse("b n c")
    assert str(caught.value) == "no '->' in factor notation 'b n c'"


def test_names_are_all_factors_of_both_sides() -> None:
    factors = Factors((("b", None, "k"),), (("b", "out"),), folds={"k": NEG_INF}, reads={"b": (0, 1)})
    assert factors.names == {"b", "k", "out"}
    assert not factors.product


def test_a_placement_prints_token_sets_in_the_shape() -> None:
    assert Placement({2: 1, 3: 0}).shape((1, 12, "s1", "s1")) == "[1, 12, t1, t0]"
    assert Placement().shape((2, 3)) == "[2, 3]"
    assert Placement({0: 0})
    assert not Placement()


def test_a_token_set_is_named_by_its_level() -> None:
    born = TokenSet(2, born=Where("/home/user/vit.py", 88))
    assert str(born) == born.name == "t2"
    assert born.born.short == "vit.py:88"
    assert TokenSet(0).size is None
