// An unmodified npm `phoenix` client speaks to a portal: arguments are a JSON object; the outcome is one JSON line.
const { Socket } = require("phoenix");
const WebSocket = require("ws");

const { url, userAgent, vsn, params, resourceId } = JSON.parse(process.argv[2]);
const outcome = { heartbeats: 0, topics: [] };

class Transport extends WebSocket {
  constructor(address, protocols) {
    super(address, protocols ?? [], { headers: { "User-Agent": userAgent } });
  }
}

const objectForm = {
  encode: ({ topic, event, payload, ref }, send) => send(JSON.stringify({ topic, event, payload, ref })),
  decode: (text, receive) => receive(JSON.parse(text)),
};

function end(problem) {
  console.log(JSON.stringify({ ...outcome, problem }));
  process.exit(problem ? 1 : 0);
}

const socket = new Socket(url, {
  transport: Transport,
  vsn,
  params,
  heartbeatIntervalMs: 100,
  ...(vsn === "1.0.0" ? objectForm : {}),
});
socket.onError((error) => end(`socket error: ${error.message ?? error}`));
socket.onMessage(({ topic, event, payload }) => {
  outcome.topics.push(`${topic} ${event}`);
  if (topic === "phoenix" && event === "phx_reply" && payload.status === "ok") outcome.heartbeats += 1;
  if (outcome.heartbeats >= 3 && outcome.flow) {
    channel.leave().receive("ok", () => { outcome.left = true; end(); });
  }
});
socket.connect();

const channel = socket.channel("client");
channel.on("init", (payload) => {
  outcome.init = payload;
  channel.push("create_flow", { resource_id: resourceId, connected_gateway_ids: [] });
  channel.push("no_such_event", {}).receive("error", (response) => { outcome.unknown = response; });
});
channel.on("flow_created", (payload) => { outcome.flow = payload; });
channel.onError(() => end("channel error"));
channel.join()
  .receive("ok", (response) => { outcome.joined = response; })
  .receive("error", (response) => end(`refused: ${JSON.stringify(response)}`));
setTimeout(() => end("timeout"), 15000);
