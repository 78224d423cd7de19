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
  const options = (schema.anyOf ?? schema.oneOf)?.filter((option) => option.type !== "null");
  if (options) return options.map((option) => kind(api, option)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.type === "array") return `list of ${kind(api, schema.items)}`;
  if (schema.format === "binary") return "bytes";
  if (schema.type === "object" && schema.additionalProperties) return `${kind(api, schema.additionalProperties)} by name`;
  const words = [schema.type];
  const least = schema.minimum ?? schema.minLength;
  const most = schema.maximum ?? schema.maxLength ?? (schema.exclusiveMaximum && schema.exclusiveMaximum - 1);
  if (least !== undefined && most !== undefined) words.push(`${least} to ${most}`);
  if (schema.minLength !== undefined || schema.maxLength !== undefined) words.push("characters");
  return words.join(" ");
}

function fieldRow(api, name, schema, required) {
  const details = [kind(api, schema)];
  if (required) details.push("required");
  else if (schema.default !== undefined) details.push(`default ${JSON.stringify(schema.default)}`);
  const words = [schema.description ?? ""];
  if (schema.examples) words.push(" For example ", ...schema.examples.flatMap((value, k) =>
    [...(k ? [", "] : []), code(JSON.stringify(value))]), ".");
  return element("tr", "", element("td", "", code(name)), element("td", "kind", details.join(", ")),
    element("td", "", ...words));
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

const example = (api, schema) => resolve(api, schema).examples?.[0] ?? {};

/** What is sent beside the body: in the address, and as headers. */
function parameters(api, described) {
  const rows = (described.parameters ?? []).map(({ name, in: where, schema, required, description, examples }) => {
    const details = { ...schema, description, examples: schema.examples ?? examples };
    const row = fieldRow(api, name, details, required);
    row.children[1].append(where === "header" ? ", a header" : ", in the address");
    return row;
  });
  return rows.length
    ? [element("h3", "", "Parameters"), element("div", "scroll", element("table", "", element("tbody", "", ...rows)))]
    : [];
}

function statuses(title, described, wanted) {
  const rows = Object.entries(described.responses).filter(([status]) => wanted(Number(status))).map(([status, answer]) =>
    element("tr", "", element("td", "", code(status)), element("td", "", answer.description)));
  return rows.length ? [element("h3", "", title), element("table", "", element("tbody", "", ...rows))] : [];
}

function curl(path, body) {
  const url = new URL(path.slice(1), document.baseURI);
  return `curl ${url} \\\n  -H 'Content-Type: application/json' \\\n  -d '${JSON.stringify(body)}'`;
}

function operation(api, path, method, described) {
  const parts = [element("h2", "", element("span", "method", method.toUpperCase()), code(path))];
  parts.push(element("p", "", described.description ?? described.summary));
  parts.push(...parameters(api, described));
  const body = described.requestBody?.content["application/json"].schema;
  if (body) {
    parts.push(element("h3", "", "Request"), ...fields(api, body, true));
    parts.push(element("h3", "", "Example"), element("pre", "", curl(path, example(api, body))));
  }
  const answer = described.responses["200"]?.content?.["application/json"]?.schema;
  const answered = answer ? fields(api, answer, false) : [];
  parts.push(...statuses("Answers", described, (status) => status < 300), ...answered);
  parts.push(...statuses("Errors", described, (status) => status >= 300));
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
