"""How the report looks and moves: its style sheet and its script, inlined into the one page.

One column of text in a serif face, figures in tabular sans, one accent colour, light or dark as
the reader's system asks; everything reflows to a phone's width. Without the script the page still
reads and plays: the browser's own audio controls show instead of the drawn ones.
"""

STYLE = """
:root{color-scheme:light dark;--ground:#fbfaf7;--card:#fff;--ink:#23262b;--soft:#6b7078;
--line:#e4e1d9;--accent:#1f6f78;--eval:#b8632e;--good:#2d7a4f;--bad:#b0413e;
--serif:Charter,"Bitstream Charter","Iowan Old Style","Source Serif 4",Georgia,serif;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
@media(prefers-color-scheme:dark){:root{--ground:#16181b;--card:#1d2024;--ink:#e4e2dc;
--soft:#979ca4;--line:#30343a;--accent:#6fc1c9;--eval:#e09a68;--good:#74c295;--bad:#e58783}
.spectrogram{filter:invert(1) hue-rotate(180deg)}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:17px/1.6 var(--serif)}
main{max-width:58rem;margin:0 auto;padding:3.5rem 1.25rem 5rem}
h1{font-size:clamp(1.8rem,5vw,2.6rem);line-height:1.15;font-weight:600;margin:0 0 .4rem;
letter-spacing:-.012em;text-wrap:balance}
h2{font-size:1.45rem;font-weight:600;margin:3.6rem 0 .5rem;letter-spacing:-.005em}
h3{font-size:1.08rem;font-weight:600;margin:2.2rem 0 .2rem}
p{margin:.4rem 0 1rem;max-width:44rem}
.lead,.note{color:var(--soft)}
.lead{font-size:1.05rem}
.note,figcaption,table,.facts,.meta,summary,.legend{font-family:var(--sans)}
.note{font-size:.82rem;line-height:1.5}
.figures{display:flex;flex-wrap:wrap;gap:1px;
margin:2rem 0 0;background:var(--line);border:1px solid var(--line);border-radius:10px;
overflow:hidden}
.figures div{flex:1 1 8.2rem;background:var(--card);padding:1rem 1.1rem}
.figures b{display:block;font:600 1.6rem/1.2 var(--sans);font-variant-numeric:tabular-nums;
letter-spacing:-.02em}
.figures span{font:.8rem/1.35 var(--sans);color:var(--soft);display:block;margin-top:.15rem}
.example{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:1.1rem 1.25rem 1.25rem;margin:1.1rem 0}
.example header{display:flex;gap:.75rem;align-items:baseline;justify-content:space-between}
.example h3{margin:0}
.meta{font-size:.78rem;color:var(--soft);white-space:nowrap}
.said{display:grid;grid-template-columns:max-content minmax(0,max-content) max-content;
gap:.1rem .9rem;
margin:.55rem 0 .9rem;font-size:.97rem}
.said dt{font:.78rem/1.9 var(--sans);color:var(--soft)}
.said dd{margin:0;overflow-wrap:anywhere}
.mark{font:600 .78rem/1.9 var(--sans)}
.right{color:var(--good)}.wrong{color:var(--bad)}
.clips{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.9rem}
.clip{margin:0;min-width:0}
.clip figcaption{font-size:.78rem;color:var(--soft);display:flex;justify-content:space-between;
gap:.8rem;
margin-bottom:.25rem;font-variant-numeric:tabular-nums}
.clip figcaption span{white-space:nowrap}
.clip figcaption span:first-child{overflow:hidden;text-overflow:ellipsis}
.clip audio{width:100%;height:2.2rem}
.scripted .clip audio{display:none}
.player{display:none}
.scripted .player{display:grid;grid-template-columns:2.1rem 1fr;gap:.5rem;align-items:center}
.player button{width:2.1rem;height:2.1rem;border-radius:50%;border:1px solid var(--line);
background:var(--ground);color:var(--accent);cursor:pointer;padding:0;display:grid;
place-items:center}
.player button:focus-visible,.wave:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.player button svg{width:.85rem;height:.85rem;fill:currentColor}
.player .stop,.playing .go{display:none}.playing .stop{display:block}
.wave{position:relative;height:3rem;cursor:pointer;touch-action:manipulation}
.wave svg{width:100%;height:100%;display:block;fill:var(--soft);opacity:.55}
.wave .done{position:absolute;inset:0;overflow:hidden;width:0}
.wave .done svg{fill:var(--accent);opacity:1;width:var(--full)}
.spectrogram{display:block;width:100%;height:5.5rem;object-fit:fill;margin-top:.4rem;
border-radius:4px;image-rendering:auto}
.scroll{overflow-x:auto;margin:1rem 0 .4rem}
table{border-collapse:collapse;width:100%;font-size:.88rem;line-height:1.4;
font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--soft);text-align:left;vertical-align:bottom}
th,td{padding:.5rem .9rem .5rem 0;border-bottom:1px solid var(--line)}
th+th,td+td{text-align:right;padding-right:0;padding-left:.9rem}
td small{display:block;color:var(--soft);font-size:.78rem;max-width:30rem}
tr.strong td{font-weight:600}
.bar{display:block;height:.4rem;border-radius:.2rem;background:var(--accent);min-width:1px}
td.barcell{width:38%;text-align:left}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,12.8rem),1fr));
gap:1.2rem 1.2rem;margin:.6rem 0 1rem}
.charts figure{margin:0;position:relative;min-width:0}
.charts figcaption{font-size:.8rem;color:var(--soft)}
.chart{width:100%;height:auto;display:block;overflow:visible}
.chart text{font:10.5px var(--sans);fill:var(--soft);font-variant-numeric:tabular-nums}
.chart .grid{stroke:var(--line);stroke-width:1}
.chart path{fill:none;stroke-linejoin:round}
.chart .raw{stroke:var(--accent);stroke-width:1;opacity:.28}
.chart .mean{stroke:var(--accent);stroke-width:1.9}
.chart .held-out path{stroke:var(--eval);stroke-width:1;opacity:.6;stroke-dasharray:2 3}
.chart .single{fill:var(--accent)}
.chart .held-out circle{fill:var(--eval)}
.chart .cursor{stroke:var(--soft);stroke-width:1}
.tip{position:absolute;top:1.4rem;right:0;font:.75rem/1.45 var(--sans);background:var(--card);
border:1px solid var(--line);border-radius:6px;padding:.25rem .5rem;pointer-events:none;
font-variant-numeric:tabular-nums;white-space:pre}
.legend{font-size:.8rem;color:var(--soft);display:flex;flex-wrap:wrap;gap:.2rem 1.3rem}
.legend i{display:inline-block;vertical-align:middle;margin-right:.45rem}
.legend .l-mean{width:1.3rem;border-top:2px solid var(--accent)}
.legend .l-raw{width:1.3rem;border-top:1px solid var(--accent);opacity:.4}
.legend .l-eval{width:.45rem;height:.45rem;border-radius:50%;background:var(--eval)}
details{border-top:1px solid var(--line);padding:.55rem 0}
details:last-of-type{border-bottom:1px solid var(--line)}
.charts-more{border:0!important;padding:0}
summary{cursor:pointer;font-size:.9rem}
summary span{color:var(--soft)}
pre{font:.76rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace;overflow-x:auto;
background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:.9rem 1rem;margin:.7rem 0}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.4rem;font-size:.85rem;
margin:1rem 0}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere}
@media(max-width:34rem){body{font-size:16px}main{padding:2rem 1rem 4rem}
.said{grid-template-columns:1fr max-content}
.said dt{grid-column:1/-1;line-height:1.3;margin-top:.3rem}
.example{padding:.9rem}.example header{flex-direction:column;gap:0}td.barcell{width:24%}}
@media print{.player button{display:none!important}details{break-inside:avoid}}
"""

SCRIPT = """
document.documentElement.classList.add('scripted');
let current = null;
for (const clip of document.querySelectorAll('.clip')) {
  const audio = clip.querySelector('audio'), wave = clip.querySelector('.wave');
  const done = clip.querySelector('.done'), button = clip.querySelector('button');
  const total = Number(clip.dataset.seconds);
  const size = () => wave.style.setProperty('--full', wave.clientWidth + 'px');
  new ResizeObserver(size).observe(wave);
  const draw = () => {
    const share = Math.min(1, audio.currentTime / total);
    done.style.width = 100 * share + '%';
    wave.setAttribute('aria-valuenow', Math.round(100 * share));
    if (!audio.paused) requestAnimationFrame(draw);
  };
  audio.addEventListener('play', () => {
    if (current && current !== audio) current.pause();
    current = audio; clip.classList.add('playing'); draw();
  });
  for (const name of ['pause', 'ended', 'seeked'])
    audio.addEventListener(name, () => {
      clip.classList.toggle('playing', !audio.paused); draw();
    });
  button.addEventListener('click', () => audio.paused ? audio.play() : audio.pause());
  wave.addEventListener('click', event => {
    const box = wave.getBoundingClientRect();
    audio.currentTime = total * (event.clientX - box.left) / box.width; audio.play();
  });
  wave.addEventListener('keydown', event => {
    const by = {ArrowLeft: -0.5, ArrowRight: 0.5}[event.key];
    if (by) { audio.currentTime = Math.max(0, audio.currentTime + by); event.preventDefault(); }
  });
}
for (const chart of document.querySelectorAll('.chart')) {
  const frame = JSON.parse(chart.dataset.frame), series = JSON.parse(chart.dataset.series);
  const cursor = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  cursor.setAttribute('class', 'cursor');
  const tip = document.createElement('div'); tip.className = 'tip'; tip.hidden = true;
  chart.append(cursor); chart.parentElement.append(tip);
  chart.addEventListener('pointermove', event => {
    const box = chart.getBoundingClientRect();
    const unit = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
    const share = (unit - frame.left) / (frame.right - frame.left);
    const step = frame.x0 + Math.min(1, Math.max(0, share)) * (frame.x1 - frame.x0);
    let at = null;
    const lines = series.map(one => {
      let i = 0;
      one.x.forEach((x, k) => { if (Math.abs(x - step) < Math.abs(one.x[i] - step)) i = k; });
      if (at === null) at = one.x[i];
      return one.name + ' ' + one.y[i] + (one.x[i] === at ? '' : ' (step ' + one.x[i] + ')');
    });
    const x = frame.left + (at - frame.x0) / (frame.x1 - frame.x0) * (frame.right - frame.left);
    cursor.setAttribute('d', `M${x},${frame.top}V${frame.bottom}`);
    tip.textContent = 'step ' + at + '\\n' + lines.join('\\n'); tip.hidden = false;
  });
  chart.addEventListener('pointerleave', () => {
    tip.hidden = true; cursor.setAttribute('d', '');
  });
}
"""
