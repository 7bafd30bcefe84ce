// Where adapters are, as pictures: disk, host memory, device.

import { bytes, count, counted } from "./format.js";
import { html } from "./ui.js";

export const TIERS = { disk: "Disk", host: "Host memory", device: "Device" };
const MOST_SHOWN = 40; // names in a picture

/** The tiers of one version: three linked boxes, filled where it is. */
export function TierPicture({ tiers }) {
  const names = Object.keys(TIERS);
  const said = names.filter((tier) => tiers.includes(tier)).map((tier) => TIERS[tier].toLowerCase());
  return html`
    <svg class="tiers" viewBox="0 0 76 20" width="76" height="20" role="img" aria-label=${`on ${said.join(", ")}`}>
      <path d="M14 10h48" />
      ${names.map((tier, index) => html`
        <rect x=${2 + index * 26} y="3" width="20" height="14" rx="4"
          class=${tiers.includes(tier) ? tier : "absent"} />`)}
    </svg>`;
}

/** All adapters by tier, with bytes and slots where the metrics are known. */
export function Residency({ adapters, latest }) {
  const inTier = (tier) => adapters.filter(({ versions }) => versions.some((version) => version.tiers.includes(tier)));
  const contents = (tier) => { // names of one content share it
    const found = adapters.flatMap((adapter) => adapter.versions).filter((version) => version.tiers.includes(tier));
    return [...new Map(found.map((version) => [version.digest, version])).values()];
  };
  const slots = latest?.value("lora_serve_adapter_slots");
  return html`
    <div class="residency">
      ${Object.entries(TIERS).map(([tier, title]) => {
        const names = inTier(tier).map((adapter) => adapter.name);
        const versions = contents(tier);
        const inSlots = tier === "device" && slots > 0;
        const size = versions.reduce((sum, each) => sum + (tier === "disk" ? each.file_bytes : each.memory_bytes), 0);
        return html`
          <section class="card tier ${tier}" aria-label=${title}>
            <h2>${title}</h2>
            <p><strong>${count(inSlots ? versions.length : names.length)}</strong>
              ${inSlots ? `of ${counted(slots, "slot")}` : names.length === 1 ? "adapter" : "adapters"}
              <span class="value">${bytes(size)}</span></p>
            ${inSlots && html`
              <div class="meter" aria-hidden="true">
                <span style=${{ width: `${(100 * versions.length) / slots}%` }}></span>
              </div>`}
            <ul class="chips">
              ${names.slice(0, MOST_SHOWN).map((name) => html`<li>${name}</li>`)}
              ${names.length > MOST_SHOWN && html`<li>and ${names.length - MOST_SHOWN} more</li>`}
            </ul>
          </section>`;
      })}
    </div>`;
}
