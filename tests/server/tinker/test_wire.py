"""Bodies that are not JSON: what numpy and the protobuf library make of them."""

import re
from pathlib import Path

import numpy as np
import pytest
import zstandard
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from flexllm_jax.server.tinker.protocol import paths, wire
from flexllm_jax.server.tinker.protocol import tinker_pb2 as pb
from tests.server.tinker.speaking import arrays, datum


def request(*data, **fields):
    return pb.ForwardBackwardRequest(
        model_id="m", seq_id=1, data=data, loss_fn="cross_entropy", **fields
    )


def test_the_generated_code_is_of_this_proto():
    """Names, numbers and types of all fields."""
    text = Path(wire.__file__).with_name("tinker.proto").read_text()
    text = re.sub(r"//.*", "", text)
    declared = set()
    for name, body in re.findall(r"message (\w+) \{(.*?)\n\}", text, re.DOTALL):
        for kind, field, number in re.findall(r"([\w<>, ]+?) (\w+) = (\d+);", body):
            declared.add((name, field, int(number), kind.split()[-1]))
    types = {
        getattr(FieldDescriptor, f"TYPE_{kind.upper()}"): kind
        for kind in ("double", "int64", "int32", "uint32", "bool", "string", "bytes")
    }
    made = set()
    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        for field in message.fields:
            kind = types.get(field.type)
            if kind is None:
                named = field.message_type or field.enum_type
                kind = named.name
                if named.name.endswith("Entry"):
                    value = named.fields_by_name["value"]
                    kind = f"{types.get(value.type) or value.message_type.name}>"
            made.add((name, field.name, field.number, kind))
    assert made == declared


def test_chunks_are_joined_and_rows_counted():
    made = datum([1, 2], target_tokens=[2, 3, 4], weights=[1.0, 0.0, -1.0])
    made.model_input.add().encoded_text.tokens = np.array([3], "<i4").tobytes()
    call = wire.read_data(request(made))
    assert call.data[0].tokens.tolist() == [1, 2, 3]
    assert call.data[0].inputs["weights"].tolist() == [1, 0, -1]
    assert call.data[0].inputs["target_tokens"].dtype == np.int64


@given(st.data())
def test_sparse_and_dense_tensors_are_the_same(data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    flat = st.lists(st.sampled_from([0, 0, 7, 9]), min_size=rows * columns, max_size=rows * columns)
    dense = np.array(data.draw(flat), np.int64).reshape(rows, columns)
    made = datum(list(range(rows)), target_tokens=dense)
    sparse = made.loss_fn_inputs["weights"]
    where = np.nonzero(dense)
    crow = np.concatenate([[0], np.cumsum((dense != 0).sum(axis=1))])
    sparse.sparse_csr.values = dense[where].astype("<i8").tobytes()
    sparse.sparse_csr.crow_indices = crow.astype("<i8").tobytes()
    sparse.sparse_csr.col_indices = where[1].astype("<i8").tobytes()
    sparse.dtype = pb.DTYPE_INT64
    sparse.shape.extend(dense.shape)
    inputs = wire.read_data(request(made)).data[0].inputs
    np.testing.assert_array_equal(inputs["weights"], inputs["target_tokens"])


def _wrong(**changes):
    made = datum([1, 2, 3], weights=[1.0, 2.0, 3.0])
    tensor = made.loss_fn_inputs["weights"]
    for name, value in changes.items():
        if name == "shape":
            del tensor.shape[:]
            tensor.shape.extend(value)
        else:
            setattr(tensor, name, value)
    return made


def _sparse(crow, columns, shape=(3, 2)):
    made = datum([1, 2, 3])
    tensor = made.loss_fn_inputs["weights"]
    tensor.sparse_csr.values = np.ones(len(columns), "<f4").tobytes()
    tensor.sparse_csr.crow_indices = np.array(crow, "<i8").tobytes()
    tensor.sparse_csr.col_indices = np.array(columns, "<i8").tobytes()
    tensor.dtype = pb.DTYPE_FLOAT32
    tensor.shape.extend(shape)
    return made


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (_wrong(shape=[2]), r"datum 0: weights: 3 values are not of shape \[2\]"),
        (_wrong(shape=[-1, -3]), "not of shape"),
        (_wrong(shape=[2**62, 2**62]), "not of shape"),
        (_wrong(dtype=pb.DTYPE_BFLOAT16), "weights: has dtype 4"),
        (_wrong(dense=b"12345"), "5 bytes are no array of float32"),
        (_wrong(dense=b"\0" * 8, shape=[2]), "must have a row for each of the 3 tokens"),
        (_sparse([0, 1, 1], [0]), "no sparse matrix"),
        (_sparse([0, 1, 1, 1], [2]), "no sparse matrix"),
        (_sparse([0, 2, 1, 1], [0]), "no sparse matrix"),
        (_sparse([0, 0, 0, 1], [0], (3, 2**40)), "no sparse matrix"),
        (pb.Datum(), "model_input: has no tokens"),
    ],
)
def test_data_that_makes_no_sense_is_named(made, says):
    with pytest.raises(ValueError, match=says):
        wire.read_data(request(made))


def test_an_image_is_refused_by_name():
    made = pb.Datum()
    made.model_input.add().image.format = "png"
    with pytest.raises(ValueError, match="a chunk of image; text only"):
        wire.read_data(request(made))


@given(st.binary(max_size=200))
def test_garbage_is_unreadable_or_has_a_model(body):
    try:
        opened = wire.open_request(body)
    except wire.Unreadable:
        return
    assert opened.model_id and opened.seq_id >= 1


def test_a_body_is_not_decompressed_beyond_the_limit():
    bomb = zstandard.ZstdCompressor().compress(b"\0" * 10**7)
    assert len(bomb) < 2000
    assert wire.decompress(bomb, 10**7) == b"\0" * 10**7
    with pytest.raises(wire.Unreadable, match="more than 1000 bytes"):
        wire.decompress(bomb, 1000)
    with pytest.raises(wire.Unreadable, match="not zstd"):
        wire.decompress(b"no", 1000)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=6))
def test_outputs_of_any_shapes_come_back(shapes):
    given_arrays = [
        np.random.default_rng(i).normal(size=(n, k) if k else (n,)).astype(np.float32)
        for i, (n, k) in enumerate(shapes)
    ]
    output = pb.ForwardBackwardOutput.FromString(
        wire.loss_output({"logprobs": given_arrays}, {"loss:sum": 2.5})
    )
    assert dict(output.metrics) == {"loss:sum": 2.5}
    back = [a for record in output.loss_fn_outputs for a in arrays(record.fields["logprobs"])]
    assert sum(record.num_datums for record in output.loss_fn_outputs) == len(given_arrays)
    for had, got in zip(given_arrays, back, strict=True):
        np.testing.assert_array_equal(had, got)


def test_the_likeliest_come_first_and_empty_cells_are_marked():
    sampled = wire.Sampled([5], [-1.0], True, [{5: -1.0, 3: -0.5, 9: -4.0}])
    top = [{}, {2: -0.1}]
    body = wire.sample_response([sampled], 2, [float("nan"), -0.1], top, 2, 3)
    response = pb.SampleResponse.FromString(body)
    topk = response.sequences[0].topk_sampled_logprobs
    assert np.frombuffer(topk.token_ids, "<i4").tolist() == [3, 5]
    prompt = response.topk_prompt_logprobs
    assert np.frombuffer(prompt.token_ids, "<i4").tolist() == [0, 0, 2, 0]
    expected = np.array([-99999.0, -99999.0, -0.1, -99999.0], np.float32)
    np.testing.assert_array_equal(np.frombuffer(prompt.logprobs, "<f4"), expected)
    assert (prompt.k, prompt.length, response.prompt_cache_hit_tokens) == (2, 2, 3)
    assert response.sequences[0].stop_reason == pb.STOP_REASON_STOP


@pytest.mark.parametrize(
    "text", ["tinker://a/weights", "tinker://a/other/b", "x://a/weights/b", "tinker:///weights/b"]
)
def test_a_path_has_three_parts(text):
    with pytest.raises(ValueError, match="must be tinker://RUN/KIND/NAME"):
        paths.parse(text)
    assert str(paths.parse("tinker://s:train:0/weights/n.1")) == "tinker://s:train:0/weights/n.1"


@pytest.mark.parametrize("name", [None, "", "..", ".", "a/b", "a\n", "x" * 256, "ü"])
def test_names_that_are_no_names(name):
    with pytest.raises(ValueError, match="must be a name of 1 to 255"):
        paths.check_name(name)
    assert paths.check_name("a" * 255) == "a" * 255
