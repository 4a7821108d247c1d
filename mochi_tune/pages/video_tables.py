"""Style and script of tables that compare videos, which play in step."""

STYLE = """
.scroll{overflow-x:auto;max-width:calc(100vw - 3rem);margin-top:.8rem}
table{border-spacing:.6rem;margin:0 -.6rem}
th{font-weight:600;font-size:.85rem;color:var(--soft);text-align:left;vertical-align:top}
td{padding:0;vertical-align:top}
video,td img{display:block;height:auto;border-radius:6px;outline:1px solid var(--rule);background:var(--rule)}
video{cursor:pointer}
button{margin-top:.8rem;padding:.25rem 1rem;border:1px solid var(--rule);border-radius:6px;background:none;
color:var(--ink);font:inherit;font-size:.85rem;cursor:pointer}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
@media print{button{display:none}}
"""
# Only visible videos play, and none until a click if the reader prefers reduced motion. All videos of a table restart
# whenever its first visible one does. A table that is too wide begins with its best column in view.
SCRIPT = """
<script>
document.querySelectorAll("table").forEach(t=>{
const all=[...t.querySelectorAll("video")],seen=new Set(),area=t.parentNode,best=t.querySelector("th.best"),
right=e=>e.getBoundingClientRect().right;
if(best)area.scrollLeft+=right(best)-right(area);
if(!all.length)return;
const button=document.createElement("button");
let plays=!matchMedia("(prefers-reduced-motion:reduce)").matches;
const show=()=>{button.textContent=plays?"Pause":"Play";
all.forEach(v=>plays&&seen.has(v)?v.play().catch(()=>{}):v.pause())},
toggle=()=>{plays=!plays;show()},
observer=new IntersectionObserver(es=>{es.forEach(e=>seen[e.isIntersecting?"add":"delete"](e.target));show()});
button.onclick=toggle;area.before(button);show();
all.forEach(v=>{observer.observe(v);v.onclick=toggle;v.addEventListener("seeked",()=>{
if(v===all.find(w=>seen.has(w)))all.forEach(w=>{
if(Math.abs(w.currentTime-v.currentTime)>.05)w.currentTime=v.currentTime})})})})</script>
"""
