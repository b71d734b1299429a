"use strict";
// The kinship map's slider: models up to a generation, in the order of the whole clustering.
(() => {
  const WORDS = { m: "measured", p: "predicted", u: "not known", i: "itself" };

  function upTo(spec, whole, generation) {
    const { names, labels, generations, kinds, named } = spec.map;
    const kept = generations.flatMap((own, n) => (own <= generation ? [n] : []));
    const places = kept.map((_, place) => place);
    const trace = spec.data[0];
    trace.x = places;
    trace.y = places;
    trace.z = kept.map((n) => kept.map((m) => whole[n][m]));
    trace.customdata = kept.map((n) => kept.map((m) => [names[n], names[m], WORDS[kinds[n][m]]]));
    trace.hovertemplate =
      "%{customdata[0]}<br>%{customdata[1]}<br>%{z:.4g}, %{customdata[2]}<extra></extra>";
    const axis = {
      tickvals: places, ticktext: kept.map((n) => labels[n]), showgrid: false, zeroline: false,
      showticklabels: kept.length <= named, ticks: kept.length <= named ? "outside" : "",
      tickfont: { size: kept.length > 25 ? 9 : 11 },
      range: [-0.5, kept.length - 0.5],
    };
    spec.layout.xaxis = { ...axis, tickangle: -60 };
    spec.layout.yaxis = { ...axis, range: [kept.length - 0.5, -0.5] };
    return kept.length;
  }

  for (const [plot, spec] of modelkin.figures) {
    if (!spec.map) continue;
    const whole = spec.data[0].z;
    const last = Math.max(...spec.map.generations);
    upTo(spec, whole, last);
    if (!spec.map.slider) continue;
    const label = document.createElement("label");
    const slider = document.createElement("input");
    const said = document.createElement("span");
    label.className = "choice";
    Object.assign(slider, { type: "range", min: 0, max: last, value: last });
    label.append("Up to generation ", slider, " ", said);
    plot.closest(".figure").prepend(label);
    const tell = (count) => { said.textContent = `${slider.value} (${count} models)`; };
    tell(spec.map.names.length);
    slider.addEventListener("input", () => {
      tell(upTo(spec, whole, +slider.value));
      modelkin.draw(plot);
    });
  }
})();
