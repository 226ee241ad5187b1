"""What an answer is to look like, as OpenAI's clients and those of others ask for it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasChoices, Field, model_validator

from flexllm_jax.server.http.body import Body


class JsonSchema(Body):
    """Of a response format."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer looks like: text, any JSON object, or JSON that has a schema, which an object
    has as `schema` for llama.cpp's clients and as `value` for huggingface_hub's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, validation_alias=AliasChoices("schema", "value"))

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and with no other")
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError("schema, or value, goes with the type json_object, and with no other")
        return self

    def wanted(self) -> dict[str, Any]:
        """What an answer must match, as StructuredOutputsParams has it."""
        schema = self.schema_ if self.json_schema is None else self.json_schema.schema_
        if schema is not None:
            return {"json": schema}
        return {"json_object": True} if self.type == "json_object" else {}
