"use strict";

// Renders openapi.json: works without a network, unlike the usual viewers, which come from a CDN.

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

const code = (text) => element("code", "", text);

function resolve(api, schema) {
  return schema?.$ref ? api.components.schemas[schema.$ref.split("/").at(-1)] : schema;
}

/** A field's type and range in words. */
function kind(api, schema) {
  const options = schema.anyOf?.filter((option) => option.type !== "null");
  if (options) return options.map((option) => kind(api, option)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.type === "array") return `list of ${kind(api, schema.items)}`;
  if (schema.type === "object" && schema.additionalProperties) return `${kind(api, schema.additionalProperties)} by name`;
  const words = [schema.type];
  const least = schema.minimum ?? schema.minLength;
  const most = schema.maximum ?? schema.maxLength ?? (schema.exclusiveMaximum && schema.exclusiveMaximum - 1);
  if (least !== undefined && most !== undefined) words.push(`${least} to ${most}`);
  if (schema.minLength !== undefined || schema.maxLength !== undefined) words.push("characters");
  return words.join(" ");
}

function fieldRow(api, name, schema, required) {
  const told = [kind(api, schema)];
  if (required) told.push("required");
  else if (schema.default !== undefined) told.push(`default ${JSON.stringify(schema.default)}`);
  return element("tr", "", element("td", "", code(name)), element("td", "kind", told.join(", ")),
    element("td", "", schema.description ?? ""));
}

/** The fields of an object, and below them those of the objects inside it. */
function fields(api, schema, showRequired) {
  const object = resolve(api, schema);
  const rows = Object.entries(object?.properties ?? {}).map(([name, field]) =>
    fieldRow(api, name, field, showRequired && object.required?.includes(name)));
  if (!rows.length) return [];
  const inner = Object.entries(object.properties).flatMap(([name, field]) => {
    const target = field.$ref ? field : field.items?.$ref ? field.items : null;
    return target ? [element("h3", "", `${name}`), ...fields(api, target, false)] : [];
  });
  return [element("div", "scroll", element("table", "", element("tbody", "", ...rows))), ...inner];
}

function example(api, schema) {
  const found = {};
  for (const [name, field] of Object.entries(resolve(api, schema).properties)) {
    if (field.examples) found[name] = field.examples[0];
  }
  return found;
}

function curl(path, body) {
  const url = new URL(path.slice(1), document.baseURI);
  return `curl ${url} \\\n  -H 'Content-Type: application/json' \\\n  -d '${JSON.stringify(body)}'`;
}

function operation(api, path, method, described) {
  const parts = [element("h2", "", element("span", "method", method.toUpperCase()), code(path))];
  parts.push(element("p", "", described.description ?? described.summary));
  const body = described.requestBody?.content["application/json"].schema;
  if (body) {
    parts.push(element("h3", "", "Request"), ...fields(api, body, true));
    parts.push(element("h3", "", "Example"), element("pre", "", curl(path, example(api, body))));
  }
  const answer = described.responses["200"]?.content?.["application/json"]?.schema;
  const answered = answer ? fields(api, answer, false) : [];
  if (answered.length) parts.push(element("h3", "", "Answer"), ...answered);
  const others = Object.entries(described.responses).filter(([status]) => status !== "200");
  if (others.length) {
    const rows = others.map(([status, response]) =>
      element("tr", "", element("td", "", code(status)), element("td", "", response.description)));
    parts.push(element("h3", "", "Errors"), element("table", "", element("tbody", "", ...rows)));
  }
  return element("section", "", ...parts);
}

async function show() {
  const api = await (await fetch("openapi.json")).json();
  const sections = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, described]) => operation(api, path, method, described)));
  const error = api.components.schemas.ErrorResponse;
  document.getElementById("docs").replaceChildren(
    element("h1", "", `${api.info.title} API`), element("p", "", api.info.description), ...sections,
    element("h2", "", "Errors"), element("p", "", error.description), ...fields(api, error, false));
}

show();
