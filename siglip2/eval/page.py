"""The report's page: style sheet and skeleton. Nothing is fetched; light and dark."""

from html import escape

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f6f3;--card:#fff;--ink:#1c1e21;--soft:#5b6068;--line:#dcdcd6;
--s0:#2b5fc4;--s1:#b4530f;--s2:#1b7a55;--s3:#7d3fb0;--good:#17713f;--bad:#b1281e;--track:#ecece7}
@media(prefers-color-scheme:dark){:root{--bg:#131518;--card:#1c1f23;--ink:#e9eaec;--soft:#a3a9b2;

--line:#33383e;--s0:#8ab0ff;--s1:#ffab70;--s2:#6cd3a5;--s3:#d0a5f5;--good:#6ad899;--bad:#ff938a;
--track:#2a2e33}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Noto Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:28px 16px 56px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:44px 0 4px}
h3{font-size:1.02rem;margin:26px 0 8px}
p{margin:0 0 12px;max-width:74ch}
.lead,.note{color:var(--soft)}.note{font-size:.9rem}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:16px 0 0;font-size:.94rem}
a{color:var(--s0)}
.grid{display:grid;gap:12px;margin:14px 0}
.tiles{grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
.tiles.wide{grid-template-columns:repeat(auto-fill,minmax(min(225px,100%),1fr))}
.wide b{font-size:1.7rem}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(310px,100%),1fr))}
.two{grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr))}
.cards{grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr))}
.tile,.chart,.card{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:12px 14px;display:flex;flex-direction:column}
.tile b{font-size:1.3rem;line-height:1.25;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tile b.long{font-size:1rem}
.tile span{color:var(--soft);font-size:.85rem}
.chart{margin:0;padding:12px 12px 6px}.card{padding:14px;min-width:0}
figcaption{font-weight:600;font-size:.94rem;display:flex;flex-wrap:wrap;
justify-content:space-between;gap:0 10px}
figcaption span{color:var(--soft);font-weight:400;font-size:.85rem}
svg{display:block;width:100%;height:auto;margin-top:6px}
svg text{fill:var(--soft);font-size:11px}
svg line.grid{stroke:var(--line);stroke-width:1}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}.curve.faint{opacity:.3;stroke-width:1}
.s0{stroke:var(--s0);--key:var(--s0)}.s1{stroke:var(--s1);--key:var(--s1)}
.s2{stroke:var(--s2);--key:var(--s2)}.s3{stroke:var(--s3);--key:var(--s3)}
.keys{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.84rem;color:var(--soft);margin:4px 0}
.key::before{content:"";display:inline-block;width:11px;height:11px;border-radius:3px;
background:var(--key);margin-inline-end:6px}
.key.light::before{opacity:.38}.key.line::before{width:2px;height:13px;border-radius:0;
background:var(--ink);vertical-align:-2px}
.bars{display:grid;grid-template-columns:auto 1fr auto;gap:5px 10px;align-items:center;
font-size:.88rem;font-variant-numeric:tabular-nums}
.bars .mean{font-weight:700}
.bar{position:relative;height:16px;background:var(--track);border-radius:4px}
.bar i{position:absolute;inset:0 auto 0 0;background:var(--s0);border-radius:4px}
.bar i.five{opacity:.38}.bar u{position:absolute;top:-2px;bottom:-2px;
width:2px;background:var(--ink)}
details{margin-top:12px}summary{cursor:pointer;font-size:.9rem;color:var(--s0)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;margin-top:8px}
th,td{padding:4px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
.ask{display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 10px;margin-bottom:10px}
.ask q{font-size:1.12rem;font-weight:600;quotes:none;overflow-wrap:anywhere}
.tag{font-size:.78rem;color:var(--soft);border:1px solid var(--line);border-radius:5px;
padding:0 6px}
.hits{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:6px;margin:0;padding:0;
list-style:none}
.hits li{text-align:center;font-size:.78rem;font-weight:700;min-width:0}
.pic{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:#fff;border-radius:7px;
padding:6%;border:2px solid var(--line)}
.right .pic{border-color:var(--good)}
.right{color:var(--good)}.wrong{color:var(--bad)}
.named{display:grid;grid-template-columns:96px minmax(0,1fr);gap:14px;align-items:start}
.named dl{display:grid;grid-template-columns:auto minmax(0,1fr);gap:3px 10px;margin:0;
font-size:.9rem}
.named dt{color:var(--soft)}.named dd{margin:0;overflow-wrap:anywhere}
.named dd span{color:var(--ink)}.named dd .also{color:var(--soft);font-size:.84rem}
.boxed{position:relative;max-width:420px}.boxed img{display:block;width:100%;height:auto;
outline:1px solid var(--line)}
.boxed span{position:absolute;max-width:100%;padding:0 5px;font-size:.8rem;font-weight:600;
overflow:hidden;text-overflow:ellipsis;white-space:nowrap;background:var(--card);
border-radius:0 0 5px 0}
.said{display:grid;grid-template-columns:auto minmax(0,1fr);gap:2px 10px;margin:10px 0 0;
font-size:.9rem}
.said dt{color:var(--soft)}.said dd{margin:0;overflow-wrap:anywhere}
footer{margin-top:48px;color:var(--soft);font-size:.88rem}
@media print{.card,.chart,.tile{break-inside:avoid}}
"""


def page(title: str, body: str) -> str:
    """A whole document; `body` is HTML that is already escaped."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
