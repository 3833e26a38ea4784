// Asks a server by OpenAI's client for node and prints the answers as one JSON object; for with_node.py.
import OpenAI from "openai";

const model = process.env.MODEL;
const client = new OpenAI({ baseURL: process.env.URL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const weather = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 }, unit: { enum: ["C", "F"] } },
  required: ["city", "unit"],
  additionalProperties: false,
};
const ask = (more) =>
  client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 12, ...more });
const answers = {};

answers.whole = (await ask({})).choices[0].message.content;
answers.streamed = "";
for await (const chunk of await ask({ stream: true })) {
  answers.streamed += chunk.choices[0]?.delta?.content ?? "";
}

const tools = [{ type: "function", function: { name: "weather", parameters: weather } }];
const called = await ask({ tools, tool_choice: "required", max_tokens: 200 });
answers.tool = called.choices[0].message.tool_calls[0].function.arguments;
const json_schema = { name: "weather", schema: weather, strict: true };
const formed = await ask({ response_format: { type: "json_schema", json_schema }, max_tokens: 200 });
answers.schema = formed.choices[0].message.content;

const input = { model, input: "Say hi.", max_output_tokens: 16, temperature: 0 };
answers.response = (await client.responses.create(input)).output_text;
answers.response_streamed = "";
for await (const event of await client.responses.create({ ...input, stream: true })) {
  if (event.type === "response.output_text.delta") answers.response_streamed += event.delta;
}

try {
  await ask({ temperature: 9 });
} catch (error) {
  answers.error = [error.status, error.param];
}
const stream = await ask({ stream: true, max_tokens: 2000 });
for await (const _ of stream) {
  stream.controller.abort();
}
answers.aborted = stream.controller.signal.aborted;
console.log(JSON.stringify(answers));
