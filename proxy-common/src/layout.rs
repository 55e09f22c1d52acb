//! What makes a struct a map type: plain old data without padding, proven at compile time.

/// Declares map types: `repr(C)`, `Pod`, and no padding, which is proven at compile time (for both
/// families where the type is generic).
///
/// Padding would be uninitialised memory: the verifier refuses to copy it from the stack, and equal
/// keys would hash differently.
#[macro_export]
macro_rules! map_type {
    (
        $(#[$meta:meta])*
        pub struct $name:ident<F> { $($(#[$doc:meta])* pub $field:ident: $type:ty,)+ }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(C)]
        pub struct $name<F: $crate::Family> { $($(#[$doc])* pub $field: $type,)+ }

        // SAFETY: repr(C) of Pod fields; the assertion below shows that there is no padding.
        unsafe impl<F: $crate::Family> bytemuck::Zeroable for $name<F> {}
        // SAFETY: as above.
        unsafe impl<F: $crate::Family> bytemuck::Pod for $name<F> {}
        // SAFETY: as above.
        #[cfg(feature = "user")]
        unsafe impl<F: $crate::Family> aya::Pod for $name<F> {}

        const _: () = {
            const fn unpadded<F: $crate::Family>() -> bool {
                size_of::<$name<F>>() == 0 $(+ size_of::<$type>())+
            }
            assert!(unpadded::<$crate::V4>() && unpadded::<$crate::V6>());
        };
    };
    (
        $(#[$meta:meta])*
        pub struct $name:ident { $($(#[$doc:meta])* pub $field:ident: $type:ty,)+ }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(C)]
        pub struct $name { $($(#[$doc])* pub $field: $type,)+ }

        // SAFETY: repr(C) of Pod fields; the assertion below shows that there is no padding.
        unsafe impl bytemuck::Zeroable for $name {}
        // SAFETY: as above.
        unsafe impl bytemuck::Pod for $name {}
        // SAFETY: as above.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name {}

        const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$type>())+);
    };
}
