"""Draws a history as one HTML page that needs nothing else: a lane for each process, a bar for each call.

Overlapping calls of one process stand below each other. Faults are shaded bands over all lanes, what etcd recorded of
the claims is a lane of its own, and anomalies are listed above and marked on their calls. Drag to move, wheel to zoom.
"""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, Any

from .truth import Truth

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .history import Event, History
    from .truth import Anomaly

COLOURS = {
    "ok": "#2f9e62",
    "refused": "#a3adb8",
    "lost": "#e08a1e",
    "unknown": "#8b5cd6",
    "error": "#b3402e",
    "created": "#1c6fd1",
    "sealed": "#0b3d78",
    "ended": "#6b7683",
}


def draw(history: History, anomalies: Sequence[Anomaly]) -> str:
    """Give the page."""
    times = [event.invoked for event in history.events] + [fault.at for fault in history.faults]
    zero = min(times, default=0)
    ends = [event.returned for event in history.events if event.returned is not None]
    ends += [fault.until for fault in history.faults if fault.until is not None] + times
    end = max(ends, default=zero + 1)
    marked = {number for anomaly in anomalies for number in anomaly.operations}

    def seconds(at: int) -> float:
        return round((at - zero) / 1e9, 6)

    data = {
        "end": seconds(end),
        "colours": COLOURS,
        "faults": [
            {"a": seconds(fault.at), "b": seconds(fault.until or end), "t": f"{fault.kind}: {fault.what}"}
            for fault in history.faults
        ],
        "lanes": _lanes(history, seconds, end, marked),
        "anomalies": [{"ops": each.operations, "revs": each.revisions} for each in anomalies],
    }
    items = "".join(f'<li tabindex="0" data-n="{n}">{escape(str(each))}</li>' for n, each in enumerate(anomalies))
    verdict = f"{len(anomalies)} anomalies" if anomalies else "no anomaly"
    return (
        PAGE.replace("@TITLE@", escape(f"{history.workload}, seed {history.seed}"))
        .replace("@VERDICT@", verdict)
        .replace("@SIZE@", f"{len(history.events)} operations, {len(history.faults)} faults")
        .replace("@ANOMALIES@", items)
        .replace("@DATA@", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))
    )


def _lanes(history: History, seconds: Any, end: int, marked: set[int]) -> list[dict[str, Any]]:
    processes: dict[str, list[Event]] = {}
    for event in sorted(history.events, key=lambda event: event.invoked):
        processes.setdefault(event.process, []).append(event)
    lanes = []
    for process in sorted(processes, key=lambda name: (len(name), name)):
        free: list[int] = []  # when each row of the lane is free again
        bars = []
        for event in processes[process]:
            until = end if event.returned is None else event.returned
            row = next((row for row, at in enumerate(free) if at <= event.invoked), len(free))
            free[row : row + 1] = [until]
            bar: dict[str, Any] = {"i": event.id, "a": seconds(event.invoked), "b": seconds(until), "r": row}
            bar |= {"o": str(event.outcome), "s": " / ".join(part for part in event.step if part), "t": _text(event)}
            bar |= {"l": event.call} | ({"open": 1} if event.returned is None else {})
            bars.append(bar | ({"bad": 1} if event.id in marked else {}))
        lanes.append({"name": process, "rows": max(1, len(free)), "bars": bars})
    return [_truth_lane(history, seconds), *lanes]


def _truth_lane(history: History, seconds: Any) -> dict[str, Any]:
    seen = {fact.revision: fact.seen for fact in history.truth if fact.seen is not None}
    told = {event.value["token"]: event.returned for event in history.events if _has_token(event)}
    bars = []
    for step, truth in Truth(history).steps.items():
        for life in truth.lives:
            changes = [(life.token, "created" if life.held else "sealed")]
            changes += [(seal.revision, "sealed") for seal in life.seals if seal.revision != life.token]
            changes += [(life.ended, "ended")] if life.ended is not None else []
            for revision, what in changes:
                at = seen.get(revision, told.get(revision))
                if at is not None:
                    text = f"etcd, revision {revision}: {what}\n{life}"
                    bar = {"i": -revision, "a": seconds(at), "b": seconds(at), "r": 0, "o": what, "t": text}
                    bars.append(bar | {"s": " / ".join(step), "l": "", "tick": 1})
    bars.sort(key=lambda bar: float(bar["a"]))
    return {"name": "etcd", "rows": 1, "bars": bars}


def _has_token(event: Event) -> bool:
    return isinstance(event.value, dict) and "token" in event.value and event.returned is not None


def _text(event: Event) -> str:
    took = "never ended" if event.returned is None else f"{(event.returned - event.invoked) / 1e6:.1f} ms"
    lines = [f"{event.id}: {event.call}: {event.outcome}, {took}", f"process {event.process}, owner {event.owner}"]
    lines += [", ".join(f"{name}={value!r}" for name, value in event.args.items())]
    if event.value is not None:
        lines.append(f"gave {event.value!r}"[:300])
    if event.error is not None:
        lines.append(f"{event.error.type}: {event.error.message}"[:300])
    return "\n".join(lines)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>@TITLE@</title><style>
body{margin:0;font:14px/1.4 system-ui,sans-serif;color:#1d2733;background:#fff}
header{padding:12px 16px 8px}h1{font-size:18px;margin:0}p{margin:2px 0 8px;color:#51606f}
#verdict{font-weight:600;color:#1d2733}
ul{margin:6px 0;padding:0;list-style:none;max-height:9.5em;overflow:auto}
li{padding:2px 8px;margin:2px 0;border-left:4px solid #d1174b;background:#fdf0f3;cursor:pointer}
li:hover,li:focus,li.on{background:#f9d3dd}
.legend span{display:inline-block;margin-right:14px}.legend i{display:inline-block;width:12px;height:12px;
border-radius:2px;margin-right:5px;vertical-align:-1px}select,button{font:inherit;margin-right:8px}
#box{position:relative;border-top:1px solid #d5dbe1}canvas{display:block;width:100%;cursor:grab}
#tip{position:fixed;display:none;max-width:520px;white-space:pre-wrap;background:#1d2733;color:#fff;padding:6px 9px;
border-radius:4px;font-size:12px;pointer-events:none;z-index:2;overflow-wrap:anywhere}
</style><header><h1>@TITLE@</h1><p><span id="verdict">@VERDICT@</span> · @SIZE@</p><ul>@ANOMALIES@</ul>
<div><label>Step <select id="step"><option value="">all</option></select></label>
<button id="all">Show everything</button><span class="legend" id="legend"></span></div></header>
<div id="box"><canvas id="c"></canvas></div><div id="tip"></div><script>
const D=@DATA@,LEFT=130,ROW=17,AXIS=36,GAP=11,canvas=document.getElementById("c"),g=canvas.getContext("2d"),
tip=document.getElementById("tip"),steps=document.getElementById("step");
let from=0,to=D.end||1,only="",focus=new Set(),drag=null,shown=[];
for(const[n,c]of Object.entries(D.colours)){const s=document.createElement("span");
s.innerHTML='<i style="background:'+c+'"></i>'+n;document.getElementById("legend").append(s)}
{const s=document.createElement("span");s.innerHTML='<i style="background:#fbe3a6"></i>fault';
document.getElementById("legend").append(s);const b=document.createElement("span");
b.innerHTML='<i style="border:2px solid #d1174b;width:9px;height:9px"></i>anomaly';
document.getElementById("legend").append(b)}
for(const s of[...new Set(D.lanes.flatMap(l=>l.bars.map(b=>b.s)))].filter(Boolean).sort())steps.append(new Option(s,s));
const width=()=>canvas.clientWidth,x=t=>LEFT+(t-from)/(to-from)*(width()-LEFT-12),
height=()=>AXIS+D.lanes.reduce((h,l)=>h+l.rows*ROW+GAP,0)+8;
function draw(){const ratio=devicePixelRatio||1,w=width(),h=height();canvas.style.height=h+"px";
canvas.width=w*ratio;canvas.height=h*ratio;g.setTransform(ratio,0,0,ratio,0,0);g.clearRect(0,0,w,h);
g.font="12px system-ui,sans-serif";g.textBaseline="middle";shown=[];
g.save();g.beginPath();g.rect(LEFT,0,w-LEFT,h);g.clip();
let labelEnd=[-1e9,-1e9];for(const f of D.faults){const a=x(f.a),b=Math.max(x(f.b),a+2);if(b<LEFT||a>w)continue;
g.fillStyle="rgba(246,190,60,.28)";g.fillRect(a,0,b-a,h);g.fillStyle="#d49a1a";g.fillRect(a,0,1,h);
shown.push({x:a,y:0,w:b-a,h:AXIS-14,t:f.t+"\\n"+f.a.toFixed(3)+" s to "+f.b.toFixed(3)+" s"});
const at=Math.max(a,LEFT)+4;if(at>labelEnd[0]){g.fillStyle="#7a5200";g.fillText(f.t,at,9);
labelEnd[0]=at+g.measureText(f.t).width+8}}
const span=to-from,unit=10**Math.floor(Math.log10(span/6)),tick=[1,2,5,10].map(n=>n*unit).find(n=>span/n<12);
g.fillStyle="#51606f";for(let t=Math.ceil(from/tick)*tick;t<=to;t+=tick){g.fillRect(x(t),AXIS-8,1,4);
g.fillText(+t.toFixed(6)+" s",x(t)+3,AXIS-9)}g.restore();
let y=AXIS;for(const l of D.lanes){const lh=l.rows*ROW;g.fillStyle="#eef1f4";g.fillRect(0,y-GAP/2,w,1);
g.fillStyle="#1d2733";g.fillText(l.name.length>18?l.name.slice(0,17)+"…":l.name,10,y+Math.min(lh,ROW)/2);
g.save();g.beginPath();g.rect(LEFT,y-8,w-LEFT,lh+12);g.clip();
for(const b of l.bars){const a=x(b.a),e=x(b.b);if(e<LEFT-4||a>w)continue;const by=y+b.r*ROW;
const dim=only&&b.s!==only;g.globalAlpha=dim?.12:1;g.fillStyle=D.colours[b.o]||"#888";
if(b.tick){g.fillRect(a-1,by+1,2,ROW-3);if(focus.has(b.i)){g.strokeStyle="#d1174b";g.lineWidth=2;
g.strokeRect(a-3,by,6,ROW-2)}}else{const bw=Math.max(e-a,2);g.fillRect(a,by+1,bw,ROW-3);
if(b.open){g.fillStyle="#fff";for(let k=Math.max(a,LEFT)+110;k<Math.min(e,w);k+=8)g.fillRect(k,by+1,2,ROW-3)}
if(bw>46&&!dim){g.fillStyle="#fff";g.save();g.beginPath();g.rect(a,by,bw-2,ROW);g.clip();
g.fillText(b.l,Math.max(a,LEFT)+4,by+ROW/2);g.restore()}
if(b.bad){g.globalAlpha=1;g.strokeStyle="#d1174b";g.lineWidth=focus.has(b.i)?4:2;g.strokeRect(a-1,by,bw+2,ROW-1);
g.fillStyle="#d1174b";g.beginPath();g.moveTo(a-5,by-5);g.lineTo(a+5,by-5);g.lineTo(a,by+3);g.fill()}}
g.globalAlpha=1;shown.push({x:a-2,y:by,w:Math.max(e-a,2)+4,h:ROW,t:b.t+"\\nfrom "+b.a.toFixed(4)+" s"})}
g.restore();y+=lh+GAP}}
function show(a,b){const least=1e-5;from=Math.max(-D.end*.02,a);to=Math.max(from+least,Math.min(D.end*1.02,b));draw()}
canvas.onwheel=e=>{e.preventDefault();const t=from+(e.offsetX-LEFT)/(width()-LEFT-12)*(to-from),
k=e.deltaY<0?.8:1.25;show(t-(t-from)*k,t+(to-t)*k)};
canvas.onmousedown=e=>{drag={x:e.offsetX,from,to}};onmouseup=()=>{drag=null};
canvas.onmousemove=e=>{if(drag){const d=(drag.x-e.offsetX)/(width()-LEFT-12)*(drag.to-drag.from);
show(drag.from+d,drag.to+d);return}
const hit=shown.findLast(s=>e.offsetX>=s.x&&e.offsetX<=s.x+s.w&&e.offsetY>=s.y&&e.offsetY<=s.y+s.h);
tip.style.display=hit?"block":"none";if(hit){tip.textContent=hit.t;
tip.style.left=Math.min(e.clientX+14,innerWidth-540)+"px";
tip.style.top=Math.min(e.clientY+14,innerHeight-tip.offsetHeight-8)+"px"}};
canvas.onmouseleave=()=>{tip.style.display="none"};
steps.onchange=()=>{only=steps.value;draw()};
document.getElementById("all").onclick=()=>{only=steps.value="";focus.clear();show(0,D.end)};
function choose(li){document.querySelectorAll("li.on").forEach(o=>o.classList.remove("on"));li.classList.add("on");
const n=D.anomalies[+li.dataset.n];focus=new Set([...n.ops,...n.revs.map(r=>-r)]);
const bars=D.lanes.flatMap(l=>l.bars).filter(b=>focus.has(b.i));if(!bars.length)return draw();
only=steps.value=bars[0].s;const a=Math.min(...bars.map(b=>b.a)),b=Math.max(...bars.map(b=>b.b)),m=(b-a)*.4+.01;
show(a-m,b+m)}
for(const li of document.querySelectorAll("li")){li.onclick=()=>choose(li);
li.onkeydown=e=>{if(e.key==="Enter")choose(li)}}
onresize=draw;draw();if(location.hash)document.querySelector('li[data-n="'+location.hash.slice(1)+'"]')?.click();
</script></html>
"""
