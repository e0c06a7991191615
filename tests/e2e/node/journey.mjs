// Connects to the app's hub as a browser would and prints each alert as one JSON line; ends by itself.
import * as signalR from "@microsoft/signalr";
import { MessagePackHubProtocol } from "@microsoft/signalr-protocol-msgpack";

const [url, symbols, protocol, seconds] = process.argv.slice(2);
const builder = new signalR.HubConnectionBuilder()
  .withUrl(`${url}/api?symbols=${symbols}`)
  .withAutomaticReconnect([0, 200, 500, 1000, 2000, 2000, 2000])
  .configureLogging(signalR.LogLevel.None);
if (protocol === "messagepack") builder.withHubProtocol(new MessagePackHubProtocol());
const connection = builder.build();
const say = (what) => process.stdout.write(JSON.stringify(what) + "\n");
connection.on("alert", (item) => say({ alert: item }));
connection.onreconnected(() => say({ reconnected: true }));
setTimeout(() => process.exit(0), Number(seconds) * 1000);
try {
  await connection.start();
  say({ ready: true });
} catch (error) {
  say({ failed: String(error) });
  process.exit(1);
}
