//! The interrupt controllers and doorbells of a real VM.

use std::io;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{Gsi, Irqchip, MsiRoute};
use crate::virtio::Doorbells;

/// Pins of the IOAPIC that KVM emulates.
const IOAPIC_PINS: u32 = 24;
/// Pins of the two PICs together.
const PIC_PINS: u32 = 16;

/// The routes that KVM makes by itself when it creates its interrupt controllers: GSI n is pin n of
/// the IOAPIC, and of the PICs as far as they go. Setting the table replaces all of it, so they are
/// repeated each time.
fn pin_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let ioapic = (0..IOAPIC_PINS).map(|pin| pin_route(pin, KVM_IRQCHIP_IOAPIC, pin));
    let pics = (0..PIC_PINS).map(|pin| {
        let chip = if pin < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
        pin_route(pin, chip, pin % 8)
    });
    ioapic.chain(pics)
}

fn pin_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}

/// A message's address as KVM takes it, lower half first.
///
/// Its destination has eight bits in 19:12. A guest that was told so (`KVM_FEATURE_MSI_EXT_DEST_ID`)
/// puts seven more into 11:5, while KVM with 32-bit ids wants all beyond eight in the upper half,
/// and without them does not look there.
fn address_in_kvm(address: u64) -> [u32; 2] {
    const DESTINATION_14_8: u32 = 0x7f << 5;
    let [low, _high] = halves(address);
    [low & !DESTINATION_14_8, (low & DESTINATION_14_8) << 3]
}

fn msi_route(route: &MsiRoute) -> kvm_irq_routing_entry {
    let [low, high] = address_in_kvm(route.message.address);
    let mut msi = kvm_irq_routing_msi { address_lo: low, address_hi: high, ..Default::default() };
    msi.data = route.message.data;
    kvm_irq_routing_entry {
        gsi: route.gsi.0,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

fn halves(address: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

impl Irqchip for VmFd {
    fn set_routes(&self, routes: &[MsiRoute]) -> io::Result<()> {
        let entries: Vec<_> = pin_routes().chain(routes.iter().map(msi_route)).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_error| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.set_gsi_routing(&table)?)
    }

    fn bind(&self, event: &EventFd, gsi: Gsi) -> io::Result<()> {
        Ok(self.register_irqfd(event, gsi.0)?)
    }

    fn unbind(&self, event: &EventFd, gsi: Gsi) -> io::Result<()> {
        Ok(self.unregister_irqfd(event, gsi.0)?)
    }
}

impl Doorbells for VmFd {
    fn ring_at(&self, address: u64, kick: &EventFd) -> io::Result<()> {
        Ok(self.register_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }

    fn silence(&self, address: u64, kick: &EventFd) -> io::Result<()> {
        Ok(self.unregister_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_long_part_of_a_destination_goes_where_kvm_looks_for_it() {
        for (address, low, high) in [
            (0xfee0_1000, 0xfee0_1000, 0),
            (0xfee2_c020, 0xfee2_c000, 1 << 8),
            (0xfee2_c000 | 0x7f << 5 | 0b1100, 0xfee2_c00c, 0x7f << 8),
            (u64::MAX, 0xffff_f01f, 0x7f << 8),
        ] {
            assert_eq!(address_in_kvm(address), [low, high], "{address:#x}");
        }
    }

    #[test]
    fn every_pin_keeps_its_route() {
        let routes: Vec<_> = pin_routes().collect();
        assert_eq!(routes.len(), 40);
        assert!((0..24).all(|gsi| routes.iter().any(|route| route.gsi == gsi)));
    }
}
