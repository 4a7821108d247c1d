"""Style and script of tables that compare videos, which play in step."""

STYLE = """
.scroll{overflow-x:auto;max-width:calc(100vw - 3rem);margin-top:.8rem}
table{border-spacing:.6rem;margin:0 -.6rem}
th{font-weight:600;font-size:.85rem;color:var(--soft);text-align:left;vertical-align:top}
td{padding:0;vertical-align:top}
video,td img{display:block;height:auto;border-radius:6px;outline:1px solid var(--rule);background:var(--rule)}
"""
# Only visible videos play. All videos of a table restart whenever its first one restarts.
SCRIPT = """
<script>
const play=e=>e.isIntersecting?e.target.play().catch(()=>{}):e.target.pause(),
seen=new IntersectionObserver(es=>es.forEach(play));
document.querySelectorAll("table").forEach(t=>{const all=[...t.querySelectorAll("video")];
all.forEach(v=>seen.observe(v));
if(all.length)all[0].addEventListener("seeked",()=>all.forEach(v=>{
if(Math.abs(v.currentTime-all[0].currentTime)>.05)v.currentTime=all[0].currentTime}))})</script>
"""
