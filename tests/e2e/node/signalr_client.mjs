// The official client, told what to do: events as JSON lines on stdout, commands as JSON lines on
// stdin. Ends when stdin ends, on {"command": "stop"}, or at its deadline.
import { createInterface } from "node:readline";
import { parseArgs } from "node:util";
import { HttpTransportType, HubConnectionBuilder, LogLevel } from "@microsoft/signalr";
import { MessagePackHubProtocol } from "@microsoft/signalr-protocol-msgpack";

const { values: given } = parseArgs({
  options: {
    url: { type: "string" },
    transport: { type: "string", default: "WebSockets" },
    protocol: { type: "string", default: "json" },
    target: { type: "string", default: "newMessage" },
    delays: { type: "string", default: "" },
    deadline: { type: "string", default: "30000" },
  },
});

const tell = (event, fields = {}) => process.stdout.write(`${JSON.stringify({ event, ...fields })}\n`);
const text = (error) => (error ? String(error.message ?? error) : null);

setTimeout(() => {
  tell("deadline");
  process.exit(3);
}, Number(given.deadline));

const builder = new HubConnectionBuilder()
  .withUrl(given.url, { transport: HttpTransportType[given.transport] })
  .configureLogging(LogLevel.None);
if (given.protocol === "messagepack") builder.withHubProtocol(new MessagePackHubProtocol());
if (given.delays) builder.withAutomaticReconnect(given.delays.split(",").map(Number));

const connection = builder.build();
connection.on(given.target, (...args) => tell("message", { arguments: args }));
connection.onreconnecting((error) => tell("reconnecting", { error: text(error) }));
connection.onreconnected((connectionId) => tell("reconnected", { connectionId }));
connection.onclose((error) => tell("closed", { error: text(error) }));

async function stop() {
  await connection.stop();
  process.exit(0);
}

async function invoke(target, args) {
  try {
    tell("answered", { result: await connection.invoke(target, ...args) });
  } catch (error) {
    tell("refused", { error: text(error) });
  }
}

const commands = createInterface({ input: process.stdin });
commands.on("line", (line) => {
  const { command, target, arguments: args = [] } = JSON.parse(line);
  if (command === "stop") stop();
  if (command === "invoke") invoke(target, args);
});
commands.on("close", stop);

try {
  await connection.start();
  tell("connected", { connectionId: connection.connectionId });
} catch (error) {
  tell("failed", { error: text(error) });
  process.exit(1);
}
